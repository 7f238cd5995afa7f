# SPDX-License-Identifier: Apache-2.0
"""DEER's rules without an engine: weights, contexts, the rows of a forward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.network import block_causal, causal_context

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.spec_decode.deer.drafting import (
    Plan,
    check_drafter,
    context_of,
    first_rows,
    greedy_drafts,
    plan_forward,
    split,
    suffix_weights,
    why_not_cached,
)


def declared(attention: str, **changes: Any) -> ModelDefaults:
    values: dict[str, Any] = {
        "strategy": "threshold",
        "block_length": 4,
        "mask_token_id": 60,
        "attention": attention,
        "block_origin": "prompt" if attention == "causal" else "start",
    }
    return ModelDefaults(**values | changes)


# -- weights ------------------------------------------------------------------


def test_suffix_weights_of_the_paper():
    weights = suffix_weights(4, 1.01)
    np.testing.assert_allclose(weights, [1.030301, 1.0201, 1.01, 1], rtol=1e-12)


def test_suffix_weights_without_a_preference():
    assert suffix_weights(3, alpha=1.0).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("length", "alpha", "message"),
    [(0, 1.01, "at least 1 mask"), (4, 0.99, "alpha is at least 1")],
)
def test_suffix_weights_refuse(length: int, alpha: float, message: str):
    with pytest.raises(ValueError, match=message):
        suffix_weights(length, alpha)


# -- drafters and contexts ----------------------------------------------------


def test_a_drafter_must_be_a_diffusion_model():
    with pytest.raises(ValueError, match=r"is a 'llama'.*`vllm-dlm models` lists"):
        check_drafter(SimpleNamespace(model_type="llama"), 8)


@pytest.mark.parametrize(("masks", "fits"), [(32, True), (33, False)])
def test_a_causal_drafter_drafts_one_block(masks: int, fits: bool):
    config = SimpleNamespace(dlm_class="causal", mask_token_id=9, dlm_block_length=32)
    if fits:
        assert check_drafter(config, masks).attention == "causal"
        return
    with pytest.raises(ValueError, match="at most 32"):
        check_drafter(config, masks)


@pytest.mark.parametrize(
    ("drafter", "page_size", "shares_pages", "automatic", "reason"),
    [
        (declared("full"), 32, False, "recompute", "both directions"),
        (declared("block"), 32, True, "cached", None),
        (
            declared("block"),
            30,
            True,
            "recompute",
            "blocks of 4 tokens do not fill pages",
        ),
        (declared("block"), 30, False, "cached", None),
        (
            declared("block", block_origin="prompt"),
            32,
            True,
            "recompute",
            "which moves",
        ),
        (declared("causal"), 30, True, "cached", None),
    ],
)
def test_context(
    drafter: ModelDefaults,
    page_size: int,
    shares_pages: bool,
    automatic: str,
    reason: str | None,
):
    found = why_not_cached(drafter, page_size, shares_pages)
    assert context_of("auto", found) == automatic
    assert context_of("recompute", found) == "recompute"
    if reason is None:
        assert not found and context_of("cached", found) == "cached"
        return
    with pytest.raises(ValueError, match=rf"{reason}.*Use 'recompute'"):
        context_of("cached", found)


# -- the rows of a forward ----------------------------------------------------


def visible(defaults: ModelDefaults, text: int, width: int) -> torch.Tensor:
    """[text + width, text + width] bool: what each row sees, after the oracle."""
    if defaults.attention == "full":
        return torch.ones(text + width, text + width, dtype=torch.bool)
    if defaults.attention == "causal":
        return causal_context(text + width, text)
    return block_causal(text + width, defaults.block_length)


def seen(plan: Plan) -> list[tuple[int, int, int]]:
    """Request, position, and number of keys that are seen, of each row."""
    rows = []
    segments = plan.segments
    for index, request in enumerate(segments.request):
        first, last = segments.query_start_loc[index : index + 2]
        for row in range(first, last):
            keys = segments.kv_lens[index]
            if plan.causal is not None and plan.causal[index]:
                keys -= last - 1 - row
            rows.append((int(request), int(plan.positions[row]), int(keys)))
    return rows


REQUESTS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 6), st.floats(0, 1)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("attention", ["full", "block", "causal"])
@pytest.mark.parametrize("shift", [0, 1])
@given(requests=REQUESTS)
def test_rows_see_what_the_drafter_was_trained_to_see(
    attention: str, shift: int, requests: list[tuple[int, int, float]]
):
    """Texts, masks, and how much of the text is known already."""
    defaults = declared(attention, shift=shift)
    ends, widths = (
        np.array(column) for column in list(zip(*requests, strict=True))[:2]
    )
    starts = np.zeros_like(ends)
    if attention != "full":
        # The last token at least is new.
        known = [int(part * (end - 1)) for end, _, part in requests]
        starts = first_rows(defaults, np.array(known))
    batch_rows = np.arange(len(ends)) * 2
    plan = plan_forward(defaults, batch_rows, starts, ends, widths)

    wanted = []
    for request, (start, end, width) in enumerate(
        zip(starts.tolist(), ends.tolist(), widths.tolist(), strict=True)
    ):
        keys = visible(defaults, end, width)
        assert (keys.long().diff(dim=1) <= 0).all()  # all of them are prefixes
        wanted += [
            (request, position, int(keys[position].sum()))
            for position in range(start, end + width)
        ]
    assert seen(plan) == wanted
    assert plan.requests.tolist() == batch_rows.tolist()
    assert plan.owners.tolist() == [request for request, _, _ in wanted]
    assert plan.is_mask.tolist() == [p >= ends[r] for r, p, _ in wanted]
    predicting = [(wanted[row][0], wanted[row][1] + shift) for row in plan.logits_rows]
    assert predicting == [
        (request, end + place)
        for request, (end, width, _) in enumerate(requests)
        for place in range(width)
    ]


def test_blocks_counted_from_the_prompt_begin_with_the_masks():
    defaults = declared("block", block_origin="prompt")
    one = np.array([6])
    plan = plan_forward(defaults, one * 0, one * 0, one, np.array([5]))
    # Blocks of 4, from 6 in both directions.
    assert [keys for _, _, keys in seen(plan)] == [2] * 2 + [6] * 4 + [10] * 4 + [11]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=8),
    most=st.integers(1, 20),
)
def test_forwards_hold_whole_requests(lengths: list[int], most: int):
    parts = [part.tolist() for part in split(np.array(lengths, np.int64), most)]
    assert [request for part in parts for request in part] == list(range(len(lengths)))
    rows = [sum(lengths[request] for request in part) for part in parts]
    for part, total in zip(parts, rows, strict=True):
        assert total <= most or len(part) == 1
    for part, total in zip(parts[1:], rows, strict=False):
        assert total + lengths[part[0]] > most  # no forward ends early


# -- tokens -------------------------------------------------------------------


def test_a_mask_is_never_drafted():
    logits = torch.tensor([[1.0, 5.0, 3.0], [2.0, 9.0, 1.0]])
    assert greedy_drafts(logits, mask_id=1).tolist() == [2, 0]
