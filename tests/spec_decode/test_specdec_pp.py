# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ without an engine: the rule on the worked example, and files of heads."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_dlm.spec_decode.specdec_pp.head import (
    HEAD_FILE,
    TRAIN_COMMAND,
    AcceptanceHead,
    StopRule,
)

EXAMPLE = [0.9, 0.8, 0.8, 0.5]
"""Of drafts 1 to 4: a rejection by then has probability .10, .28, .424, .712."""


def drafted_by(rule: StopRule, accept: list[float], limit: int = 99) -> int:
    """How many tokens a row drafts whose i-th draft is accepted with accept[i]."""
    accepted, limits = torch.ones(1), torch.tensor([limit])
    drafted = 1
    while rule.goes_on(accepted, drafted, limits).item():
        accepted = accepted * accept[drafted - 1]
        drafted += 1
    return drafted


@pytest.mark.parametrize(
    ("threshold", "drafted"),
    # The step that draws token n has read drafts 1 to n - 1, and always submits n.
    [(0.05, 2), (0.2, 3), (0.3, 4), (0.42, 4), (0.43, 5), (0.7, 5)],
)
def test_the_token_drawn_in_the_step_that_stops_is_submitted(
    threshold: float, drafted: int
) -> None:
    assert drafted_by(StopRule(threshold, 1, 20), EXAMPLE) == drafted


def test_bounds_go_before_the_head() -> None:
    sure = [1.0] * 30
    assert drafted_by(StopRule(0.7, 2, 20), sure) == 20
    assert drafted_by(StopRule(0.7, 2, 20), sure, limit=3) == 3
    assert drafted_by(StopRule(0.05, 4, 20), EXAMPLE) == 4
    assert drafted_by(StopRule(0.05, 4, 20), EXAMPLE, limit=2) == 2
    # The first input is verified: whatever the head would say of it, one more is drawn.
    assert drafted_by(StopRule(0.01, 1, 20), [0.0]) == 2


def test_rows_stop_each_for_itself() -> None:
    accepted = torch.tensor([0.29, 0.31, 1.0, 0.0, 0.9])
    limits = torch.tensor([9, 9, 4, 9, 4])
    rule = StopRule(0.7, 2, 20)
    assert rule.goes_on(accepted, 3, limits).tolist() == [
        False,
        True,
        True,
        False,
        True,
    ]
    assert rule.goes_on(accepted, 4, limits).tolist() == [
        False,
        True,
        False,
        False,
        False,
    ]
    assert rule.goes_on(accepted, 1, limits).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 2, 20), "stop_threshold must be between 0 and 1; got 0.0"),
        ((1.0, 2, 20), "stop_threshold"),
        ((0.7, 0, 20), "min_tokens must be from 1 to num_speculative_tokens (20)"),
        ((0.7, 21, 20), "got 21"),
    ],
)
def test_the_rule_refuses(values: tuple[float, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StopRule(*values)


def random_head(num_blocks: int = 3) -> AcceptanceHead:
    torch.manual_seed(num_blocks)
    return AcceptanceHead(8, num_blocks)


@torch.no_grad()
def by_hand(head: AcceptanceHead, hidden: torch.Tensor) -> float:
    """P(accept) of one hidden state, in float64 and loops."""
    state = hidden.double()
    for block in head.blocks:
        linear = block.weight.double() @ state + block.bias.double()
        state = state + linear / (1 + (-linear).exp())
    reject, accept = head.output.weight.double() @ state + head.output.bias.double()
    return float(accept.exp() / (accept.exp() + reject.exp()))


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_head_computes_and_comes_back_from_its_file(
    num_blocks: int, tmp_path: Path
) -> None:
    head = random_head(num_blocks)
    states = torch.randn(4, 5, 8)
    expected = torch.tensor([[by_hand(head, s) for s in row] for row in states])
    torch.testing.assert_close(head.accept_probability(states), expected)
    assert head.accept_probability(states.bfloat16()).dtype == torch.float32

    path = head.save(tmp_path, {"target": "big", "draft": "small"})
    assert path == tmp_path / HEAD_FILE
    for source in (tmp_path, path, str(path)):
        loaded = AcceptanceHead.load(source, hidden_size=8)
        assert torch.equal(
            loaded.accept_probability(states), head.accept_probability(states)
        )
        assert loaded.about == {"target": "big", "draft": "small"}
        assert not any(weight.requires_grad for weight in loaded.parameters())


def repository_names(head: AcceptanceHead, kept: int) -> dict[str, torch.Tensor]:
    """As the paper's repository names them; copies of the first `kept` blocks."""
    weights = {}
    for index, block in enumerate(head.blocks[:kept]):
        for kind in ("weight", "bias"):
            weights[f"model.{index}.linear.{kind}"] = getattr(block, kind).data.clone()
    for kind in ("weight", "bias"):
        weights[f"model.{len(head.blocks)}.{kind}"] = getattr(head.output, kind).data
    return weights


def test_the_released_head_is_one_block_applied_three_times(tmp_path: Path) -> None:
    tied = random_head()
    for block in tied.blocks:
        block.load_state_dict(tied.blocks[0].state_dict())
    states = torch.randn(6, 8)
    expected = tied.accept_probability(states)
    # safetensors keeps one copy of the shared block, torch all three.
    once, thrice = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    save_file(repository_names(tied, 1), once)
    torch.save(repository_names(tied, 3), thrice)
    for file in (once, thrice):
        loaded = AcceptanceHead.load(file, hidden_size=8)
        assert len(loaded.blocks) == 3
        assert torch.equal(loaded.accept_probability(states), expected)


def test_missing_and_foreign_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / HEAD_FILE))) as error:
        AcceptanceHead.load(tmp_path)
    assert TRAIN_COMMAND in str(error.value)

    random_head().save(tmp_path)
    with pytest.raises(ValueError, match="width 8, the draft model's have width 16"):
        AcceptanceHead.load(tmp_path, hidden_size=16)

    files = {name: tmp_path / name for name in ("text.safetensors", "text.bin")}
    for file in files.values():
        file.write_text("not a checkpoint")
    files["model"] = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, files["model"])
    files["no block"] = tmp_path / "no_block.safetensors"
    save_file(repository_names(random_head(), 0), files["no block"])
    files["shapes"] = tmp_path / "shapes.safetensors"
    shapes = {**random_head().state_dict(), "blocks.1.weight": torch.zeros(3, 3)}
    save_file(shapes, files["shapes"])
    for file in files.values():
        with pytest.raises(ValueError, match="is not an acceptance head") as error:
            AcceptanceHead.load(file)
        assert str(file) in str(error.value)

    with pytest.raises(ValueError, match="hidden_size >= 1"):
        AcceptanceHead(0)
