# SPDX-License-Identifier: Apache-2.0
"""Where a request's blocks, masks and canvas lie; by hand, and for any lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from canvas_requests import (
    MAX_CANVAS,
    compute,
    declared,
    make_request,
    preempt,
    write,
)
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.config.tccf import one_at_a_time
from vllm_dlm.model_executor.layout import (
    Limits,
    RequestLayout,
    canvas_width,
    lay_out,
    steps_per_block,
    usual_rows,
)

BLOCK = declared()
LEADS = declared(shift=1)
CAUSAL = declared(attention="causal", block_origin="prompt", leads=True)
FULL = declared(attention="full", block_origin="prompt")
SHIFTED = declared(attention="full", block_origin="prompt", shift=1)
MODELS = {"block": BLOCK, "leads": LEADS, "causal": CAUSAL, "full": FULL}


def laid_out(
    model: ModelDefaults,
    prompt_len: int,
    num_known: int | None = None,
    max_tokens: int = 8,
    *,
    max_model_len: int = 1024,
    second_stage: bool = False,
    **options: Any,
) -> RequestLayout:
    """The layout of a new request, or of one of which more tokens are known."""
    config = resolve(DlmConfig(**options), None, model).sized(max_tokens, MAX_CANVAS)
    return lay_out(
        one_at_a_time(config) if second_stage else config,
        model,
        Limits(MAX_CANVAS, max_model_len),
        prompt_len=prompt_len,
        num_known=prompt_len if num_known is None else num_known,
        max_tokens=max_tokens,
    )


# -- by hand -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "prompt_len", "num_known", "wanted"),
    [
        # origin, first block, first mask, end of the text
        (BLOCK, 10, 10, (0, 8, 10, 20)),  # the prompt begins the block
        (BLOCK, 8, 8, (0, 8, 8, 16)),
        (BLOCK, 10, 11, (0, 8, 10, 20)),  # replayed, also what was emitted
        (BLOCK, 10, 15, (0, 12, 12, 20)),
        (LEADS, 8, 8, (0, 8, 8, 16)),
        (LEADS, 8, 9, (0, 8, 9, 16)),  # the lead stays
        (LEADS, 8, 11, (0, 8, 9, 16)),  # the lead alone
        (LEADS, 9, 11, (0, 8, 9, 20)),  # the prompt holds the lead's place
        (LEADS, 9, 12, (0, 12, 12, 20)),
        (CAUSAL, 10, 10, (2, 10, 10, 18)),
        (CAUSAL, 10, 12, (2, 10, 11, 18)),
        (FULL, 10, 10, (2, 10, 10, 18)),
        (FULL, 10, 15, (2, 14, 14, 18)),
    ],
)
def test_blocks_and_masks(
    model: ModelDefaults,
    prompt_len: int,
    num_known: int,
    wanted: tuple[int, int, int, int],
):
    layout = laid_out(model, prompt_len, num_known)
    assert wanted == (
        layout.origin,
        layout.first_block,
        layout.first_mask,
        layout.text_end,
    )
    assert layout.num_emitted == num_known - prompt_len


@pytest.mark.parametrize(
    ("model", "prompt_len", "num_known", "leads_first", "first_step"),
    [
        (LEADS, 8, 8, True, 0),
        (LEADS, 8, 9, False, 1),
        (LEADS, 8, 12, True, 0),
        (LEADS, 9, 9, False, 0),
        (LEADS, 9, 11, False, 0),
        (CAUSAL, 9, 9, True, 0),
        (CAUSAL, 9, 10, False, 1),
        (BLOCK, 8, 8, False, 0),
        (BLOCK, 8, 9, False, 0),
        (FULL, 8, 8, False, 0),
    ],
)
def test_who_decides_the_first_blocks_lead(
    model: ModelDefaults,
    prompt_len: int,
    num_known: int,
    leads_first: bool,
    first_step: int,
):
    layout = laid_out(model, prompt_len, num_known)
    assert (layout.leads_first, layout.first_step) == (leads_first, first_step)
    assert layout.knows_lead == (first_step == 1)


def test_the_context_may_end_the_text():
    assert laid_out(BLOCK, 10, max_model_len=14).text_end == 14
    assert laid_out(FULL, 10, max_model_len=14).canvas_from(10) == 14


def test_full_attention_opens_canvases_as_wide_as_they_may_be():
    layout = laid_out(FULL, 3, max_tokens=50)
    assert [layout.canvas_from(tokens) for tokens in (3, 35)] == [35, 55]
    # Where blocks are final, a canvas ends with the text.
    assert laid_out(BLOCK, 3, max_tokens=50).canvas_from(3) == 56


def test_a_block_may_be_the_whole_canvas():
    for max_tokens, length in ((8, 8), (50, MAX_CANVAS)):
        layout = laid_out(FULL, 3, max_tokens=max_tokens, block_length="canvas")
        assert layout.block_length == layout.sub_block_length == length


def test_the_second_stage_has_blocks_of_one():
    layout = laid_out(CAUSAL, 10, 15, second_stage=True)
    assert (layout.block_length, layout.sub_block_length) == (1, 1)
    assert (layout.origin, layout.first_block, layout.text_end) == (0, 15, 18)
    assert (layout.leads_first, layout.steps_per_block) == (True, 1)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 4),
        ({"steps": 4}, 2),  # over a canvas of two blocks
        ({"steps_per_block": 3}, 3),
        ({"steps_per_block": 9}, 4),
    ],
)
def test_steps_of_a_block(options: dict[str, int], steps: int):
    assert laid_out(FULL, 10, **options).steps_per_block == steps


@pytest.mark.parametrize(
    ("attention", "shift", "options", "opens"),
    [
        ("full", 1, {"cache": "dual", "reference_exact": True}, True),
        ("full", 0, {"cache": "dual", "reference_exact": True}, False),
        ("full", 1, {"cache": "dual"}, False),
        ("full", 1, {"cache": "window", "reference_exact": True}, True),
        ("causal", 1, {"reference_exact": True}, False),
    ],
)
def test_whose_blocks_open_alone(
    attention: str, shift: int, options: dict[str, Any], opens: bool
):
    model = declared(attention=attention, shift=shift, block_origin="prompt")
    assert laid_out(model, 10, **options).opens_alone == opens


@pytest.mark.parametrize(
    ("tokens", "block", "most", "width"),
    [(1, 8, 64, 8), (8, 8, 64, 8), (9, 8, 64, 16), (500, 8, 64, 64), (500, 8, 63, 56)],
)
def test_a_canvas_is_made_of_whole_blocks(tokens, block, most, width):
    assert canvas_width(tokens, block, most) == width


def test_a_canvas_holds_one_block_at_least():
    assert canvas_width(1, 32, 8) == 32


@pytest.mark.parametrize(
    ("steps", "per_block"), [(None, 16), (64, 16), (32, 8), (4, 1), (1, 1), (999, 16)]
)
def test_steps_are_spread_evenly_over_the_blocks(steps, per_block):
    assert steps_per_block(steps, 64, 16) == per_block


# -- for any lengths ---------------------------------------------------------

lengths = st.integers(1, 40)


@given(model=st.sampled_from(list(MODELS)), prompt_len=lengths, emitted=lengths)
def test_a_replay_masks_the_active_block_alone(
    model: str, prompt_len: int, emitted: int
):
    """Blocks lie where they lay; what stands left of the active one stays."""
    new = laid_out(MODELS[model], prompt_len, max_tokens=40)
    known = prompt_len + emitted
    layout = laid_out(MODELS[model], prompt_len, known, max_tokens=40)
    assert (layout.origin, layout.block_length) == (new.origin, new.block_length)
    assert layout.text_end == new.text_end
    assert layout.steps_per_block == new.steps_per_block
    block = layout.first_block
    assert block == layout.block_at(known) and (block - layout.origin) % 4 == 0
    assert block <= known < block + 4
    # The prompt is never masked, nor a lead that was emitted.
    assert layout.first_mask == max(block + layout.knows_lead, prompt_len)
    assert layout.first_mask <= known
    assert not (layout.leads_first and layout.knows_lead)


@given(
    model=st.sampled_from(list(MODELS)),
    prompt_len=lengths,
    counts=st.lists(st.integers(0, 4), max_size=12),
)
def test_the_worker_lays_out_what_the_scheduler_computes(
    model: str, prompt_len: int, counts: list[int]
):
    """Of a request that is preempted after some steps: from its number of tokens."""
    defaults = MODELS[model]
    request = make_request(
        prompt_len,
        40,
        attention=defaults.attention,
        shift=defaults.shift,
        leads=defaults.leads,
        block_origin=defaults.block_origin,
    )
    for count in counts:
        _, end, _ = compute(request)
        is_lead = end == request.block_start
        room = min(request.block_start + 4, end) - len(request.all_token_ids)
        write(request, min(count, 1 if is_lead else room))
        request.go_on()
    preempt(request)
    known = len(request.all_token_ids)
    worker = laid_out(defaults, prompt_len, known, max_tokens=40)
    assert worker == request.layout
    assert request.block_start == worker.first_block
    assert request.step == worker.first_step
    # From these rows the worker knows whether the forward decides a lead.
    start, end = request.next_rows()
    assert start == 0
    assert (end == worker.first_block) == worker.leads_first
    if not worker.is_full:
        assert request.canvas_end == worker.text_end


@given(prompt_len=lengths, max_tokens=st.integers(1, 200))
def test_canvases_follow_each_other_to_the_texts_end(prompt_len: int, max_tokens: int):
    layout = laid_out(FULL, prompt_len, max_tokens=max_tokens)
    at = prompt_len
    while at < layout.text_end:
        end = layout.canvas_from(at)
        assert 0 < end - at <= MAX_CANVAS and (end - at) % 4 == 0
        at = end
    assert at == layout.text_end


@pytest.mark.parametrize(
    ("model", "cache", "rows"),
    [
        (BLOCK, "none", 4),
        (FULL, "none", 22),  # prompt and canvas
        (FULL, "prefix", 12),  # the canvas
        (FULL, "dual", 4),
        (SHIFTED, "dual", 5),  # and the row to its left
        (SHIFTED, "prefix", 13),
    ],
)
def test_the_widest_step_behind_a_blocks_first(model, cache, rows):
    layout = laid_out(model, 10, max_tokens=12, cache=cache)
    assert layout.widest_step == rows


# -- several blocks decided together -------------------------------------------


def together(
    model: ModelDefaults, prompt_len: int, num_known: int, max_tokens: int
) -> RequestLayout:
    """The layout of a request that decides four blocks of 4 together."""
    config = resolve(DlmConfig(), None, model).sized(max_tokens, MAX_CANVAS)
    return lay_out(
        replace(config, block_length=16, sub_block_length=16),
        model,
        Limits(MAX_CANVAS, 1024),
        prompt_len=prompt_len,
        num_known=num_known,
        max_tokens=max_tokens,
    )


@pytest.mark.parametrize(
    ("prompt_len", "num_known", "max_tokens", "wanted"),
    [
        # first span, first mask, end of the text: in its last block of 4
        (10, 10, 30, (8, 10, 40)),
        (10, 23, 30, (8, 10, 40)),  # replayed, whole
        (10, 25, 30, (24, 24, 40)),
        (8, 8, 30, (8, 8, 40)),
        (8, 8, 3, (8, 8, 12)),
        (21, 21, 30, (20, 21, 52)),
    ],
)
def test_spans_begin_where_the_prompt_ends(prompt_len, num_known, max_tokens, wanted):
    layout = together(BLOCK, prompt_len, num_known, max_tokens)
    assert (layout.first_block, layout.first_mask, layout.text_end) == wanted
    assert (layout.attended_length, layout.block_length) == (4, 16)


@given(prompt_len=lengths, emitted=st.integers(0, 90))
def test_spans_are_whole_blocks_of_attention(prompt_len: int, emitted: int):
    model = declared(block_origin="start" if prompt_len % 2 else "prompt")
    known = prompt_len + emitted
    layout = together(model, prompt_len, known, 100)
    alone = laid_out(model, prompt_len, known, 100)
    first = laid_out(model, prompt_len, max_tokens=100).first_block
    assert (layout.first_block - first) % 16 == 0
    assert layout.first_block <= known < layout.first_block + 16
    assert layout.text_end == alone.text_end
    for position in range(known, known + 9):
        assert layout.attended_at(position) == alone.block_at(position)


def test_a_span_has_more_segments_than_a_whole_graph():
    config = resolve(DlmConfig(), None, BLOCK).sized(64, MAX_CANVAS)
    assert usual_rows(config, BLOCK) == 4
    assert usual_rows(replace(config, block_length=16), BLOCK) is None


# -- rows of a step in the middle of a block -----------------------------------


def usual(model: ModelDefaults, **options: Any) -> int | None:
    config = resolve(DlmConfig(**options), None, model)
    return usual_rows(config.sized(64, MAX_CANVAS), model)


@pytest.mark.parametrize("name", ["block", "leads", "causal"])
def test_usual_rows_are_the_block(name: str):
    model = MODELS[name]
    assert usual(model) == model.block_length


def test_usual_rows_of_sub_blocks():
    """A step computes the block or a part of it."""
    model = declared(shift=1, sub_block_length=2)
    assert usual(model) == model.block_length
    assert usual(model, cache="dual") is None


@pytest.mark.parametrize(
    ("cache", "cache_config", "shift", "rows"),
    [
        ("none", {}, 0, None),
        ("prefix", {}, 0, None),
        ("dual", {}, 0, 16),
        ("dual", {}, 1, 17),
        ("vicinity", {"look_back": 3, "look_ahead": 5}, 0, 24),
        ("window", {}, 0, None),
    ],
)
def test_usual_rows_with_full_attention(
    cache: str, cache_config: dict[str, int], shift: int, rows: int | None
):
    model = declared(attention="full", block_origin="prompt", shift=shift)
    options = {"cache": cache, "cache_config": cache_config, "block_length": 16}
    assert usual(model, **options) == rows
