# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion training: both streams, the loss, and blocks that grow."""

import json

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import Row, lay_out, split_rows, step_generator, task_rows

torch = pytest.importorskip("torch")

from training.tiny_learner import (  # noqa: E402
    tiny_folder,
    tiny_learner,
    train_command,
    weights_of,
)

END, MASK, BLOCK = 0, 2, 4


def make(folder, **options):
    return tiny_learner(folder, "sdar", **options)


def some_batch(count=6):
    return lay_out(task_rows(count, 1), end_id=END, canvas_length=32)


def streams_of(batch, block=BLOCK, objective="sdar", step=0):
    from vllm_dlm.training.recipes.block_size import corrupt

    return corrupt(
        batch,
        block,
        mask_id=MASK,
        end_id=END,
        generator=step_generator(1, step),
        objective=objective,
    )


def text_of(streams, row):
    """The clean text of a row by position, and its masked one."""
    clean, masked = {}, {}
    for place in range(streams.inputs.shape[1]):
        if streams.texts[row, place] == 0:
            text = clean if streams.copies[row, place] < 0 else masked
            position = int(streams.positions[row, place])
            assert position not in text
            text[position] = int(streams.inputs[row, place])
    return clean, masked


def test_the_streams_hold_what_is_seen():
    rows = [
        Row([1, *range(50, 56)], [21, 22, END]),
        Row([1], [31, END]),
        Row([1, 9, 9, 9], [41, 42, 43, END]),
    ]
    streams = streams_of(lay_out(rows, end_id=END, canvas_length=32))
    wanted = [
        # The prompt's last three tokens share a block with the answer's first.
        ([1, *range(50, 56), 21], {*range(4, 12)}, {7, 8, 9, 10, 11}),
        ([], {*range(4)}, {1, 2, 3}),
        ([1, 9, 9, 9], {*range(4, 8)}, {4, 5, 6, 7}),
    ]
    for row, (left, places, maskable) in enumerate(wanted):
        clean, masked = text_of(streams, row)
        whole = rows[row].prompt_ids + rows[row].response_ids + [END] * 8
        assert [clean[place] for place in range(len(left))] == left
        assert all(clean[place] == whole[place] for place in clean)
        assert set(masked) == places
        for place, token in masked.items():
            assert token == whole[place] or (token == MASK and place in maskable)
        found = streams.targets[row][streams.copies[row] == 0].tolist()
        first = min(places)
        assert found[: len(places)] == whole[first : first + len(places)]
        # What is masked, and nothing else, has a weight; each row has a mask.
        assert (streams.inputs[row] == MASK).any()
    assert torch.equal(streams.weights > 0, streams.inputs == MASK)


def naive_loss(learner, batch, streams, block):
    """Row by row, and block by block: the clean text to its left, and the block."""
    total = 0.0
    for row in range(len(batch.ids)):
        clean = [int(token) for token in batch.ids[row]] + [END] * block
        _, masked = text_of(streams, row)
        weights = {
            int(streams.positions[row, place]): float(streams.weights[row, place])
            for place in range(streams.inputs.shape[1])
            if streams.texts[row, place] == 0 and streams.copies[row, place] == 0
        }
        for first in range(min(masked), max(masked) + 1, block):
            inputs = clean[:first] + [masked[first + i] for i in range(block)]
            logits = learner.network(torch.tensor([inputs]))[0].log_softmax(-1)
            for place in range(first, first + block):
                if inputs[place] == MASK:
                    total -= weights[place] * float(logits[place, clean[place]])
    return total


@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize("objective", ["sdar", "dfactory"])
def test_the_loss_is_that_of_each_block_behind_clean_text(tmp_path, block, objective):
    from vllm_dlm.training.recipes.block_size import loss

    learner, batch = make(tmp_path), some_batch(3)
    learner.network.eval()
    learner.network.attention_block = block
    streams = streams_of(batch, block, objective)
    with torch.no_grad():
        found = float(loss(learner, streams, block))
        wanted = naive_loss(learner, batch, streams, block)
    assert abs(found - wanted) < 1e-4 * wanted


def test_rates_and_weights():
    rows = [Row([1, 11, 12, 13], [21] * 399 + [END])] * 100
    batch = lay_out(rows, end_id=END)
    for objective, low, high in (("sdar", 0.001, 1.0), ("dfactory", 0.3, 0.8)):
        streams = streams_of(batch, objective=objective)
        masked = streams.weights > 0
        shares = masked.sum(1) / 400
        assert shares.min() < low + 0.08 and shares.max() > high - 0.08
        assert abs(shares.mean() - (low + high) / 2) < 0.08
        if objective == "sdar":
            # 1 / (p N), N of all rows: from that a row's p, which its masks follow.
            rates = 1 / (streams.weights.max(1).values * 400 * len(rows))
            assert (rates - shares).abs().max() < 5 * 0.5 / 400**0.5
            for weights, rate in zip(streams.weights, rates, strict=True):
                found = weights[weights > 0] * 400 * len(rows) * rate
                torch.testing.assert_close(found, torch.ones_like(found))
        else:
            found = streams.weights[masked] * masked.sum()
            torch.testing.assert_close(found, torch.ones_like(found))


def test_a_row_that_draws_no_mask_gets_one():
    batch = lay_out([Row([1, 9, 9], [END])] * 400, end_id=END)
    streams = streams_of(batch)
    assert ((streams.inputs == MASK).sum(1) >= 1).all()
    assert (streams.inputs != MASK).any()


def test_one_block_for_all_of_a_row_is_fine_tuning(tmp_path):
    """Behind an empty clean text, and full attention in the block: sft's inner loss."""
    from vllm_dlm.training.recipes import block_size, sft

    learner = make(tmp_path)
    learner.network.eval()
    block = 32
    learner.network.attention_block = block
    [row] = task_rows(1, 5)
    canvas = block - len(row.prompt_ids)
    assert 0 < len(row.response_ids) < canvas
    batch = lay_out([row], end_id=END, canvas_length=canvas)
    streams = streams_of(batch, block)
    masked = streams.weights > 0
    # One row, N = G: the weights are sft's 1 / (p G).
    as_sft = sft.Masked(batch.ids, streams.inputs, batch.valid, streams.weights)
    assert streams.inputs.shape == batch.ids.shape
    assert not (masked & ~batch.response).any()
    with torch.no_grad():
        found = block_size.loss(learner, streams, block)
        torch.testing.assert_close(found, sft.loss(learner, as_sft))


@pytest.mark.parametrize("objective", ["sdar", "dfactory"])
def test_a_batch_s_loss_is_that_of_its_rows_alone(tmp_path, objective):
    from vllm_dlm.training.recipes.block_size import loss

    learner = make(tmp_path)
    streams = streams_of(some_batch(), objective=objective)
    whole = loss(learner, streams, BLOCK)
    alone = sum(loss(learner, part, BLOCK) for part in split_rows(streams, 6, 6))
    torch.testing.assert_close(alone, whole)


def test_blocks_double():
    from vllm_dlm.training.recipes.block_size import block_lengths

    assert block_lengths(2, 16) == [2, 4, 8, 16]
    assert block_lengths(6, 6) == [6]
    for first, last in ((4, 12), (8, 4)):
        with pytest.raises(ValueError, match=f"--to {last}: .*doubling"):
            block_lengths(first, last)


def options_of(folder, output, *more):
    return train_command("block-size", folder, output, "--to", "16", *more)


def test_an_interrupted_run_ends_at_the_same_bits(tmp_path):
    folder = tiny_folder(tmp_path / "model", "sdar")
    assert main(options_of(folder, tmp_path / "whole")) == 0
    # Every run stops after one step; two steps have blocks of 8, two of 16.
    for _ in range(4):
        stopped = options_of(folder, tmp_path / "parts", "--max-minutes", "1e-9")
        assert main(stopped) == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    before = weights_of(folder)
    assert not all(torch.equal(whole[name], before[name]) for name in whole)
    sizes = [
        json.loads((tmp_path / name / "config.json").read_text())["block_size"]
        for name in ("model", "whole", "parts")
    ]
    assert sizes == [4, 16, 16]


def test_what_cannot_grow_is_refused(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "sdar", "sdar")
    assert main(options_of(folder, tmp_path / "out", "--from", "6")) == 2
    assert "--from 6 by doubling" in capsys.readouterr().err
    folder = tiny_folder(tmp_path / "llada")
    assert main(options_of(folder, tmp_path / "out")) == 2
    assert "full attention" in capsys.readouterr().err
