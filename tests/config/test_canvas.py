# SPDX-License-Identifier: Apache-2.0
"""Canvases as the engine has them, and the layout of requests that bring one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.config.canvas import Canvas, CanvasOptions
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.messages import OptionError
from vllm_dlm.model_executor.layout import Limits, lay_out

MASK = 9
MODEL = ModelDefaults("threshold", 4, MASK)
BLOCKS = replace(MODEL, attention="block", block_origin="start")

ids = st.lists(st.sampled_from([1, 2, MASK]), min_size=1, max_size=40)


@given(ids)
def test_holes_are_where_masks_are(tokens: list[int]):
    canvas = Canvas.of_ids(tokens, MASK)
    assert canvas.is_hole.tolist() == [token == MASK for token in tokens]
    written = [i for i, token in enumerate(tokens) if token != MASK]
    assert canvas.pins_end == (written[-1] + 1 if written else 0)
    masks = [i for i, token in enumerate(tokens) if token == MASK]
    for offset in range(len(tokens) + 1):
        behind = [i for i in masks if i >= offset] + [len(tokens)]
        assert canvas.next_hole(offset) == behind[0]
        for number in (1, 2, 50):
            assert (
                canvas.nth_hole(offset, number)
                == behind[min(number - 1, len(behind) - 1)]
            )
    text = "".join("m" if token == MASK else "w" for token in tokens)
    assert canvas.longest_written == max(map(len, text.split("m")))
    starts = [start for start, _ in canvas.holes]
    assert starts == sorted(starts)


@given(ids)
def test_it_travels(tokens: list[int]):
    canvas = Canvas.of_ids(tokens, MASK, pinned=False, shrinks=True)
    assert Canvas.from_plain(canvas.to_plain()) == canvas


@given(st.integers(0, 5), st.integers(1, 9), st.integers(0, 5), st.integers(1, 9))
def test_an_elastic_hole(left: int, most: int, right: int, initial: int):
    initial = min(initial, most)
    ids = [1] * left + [MASK] * most + [2] * right
    canvas = Canvas.of_ids(ids, MASK, initial=initial)
    assert canvas.is_elastic and Canvas.from_plain(canvas.to_plain()) == canvas
    begun = canvas.begun
    assert begun == Canvas.of_ids([1] * left + [MASK] * initial + [2] * right, MASK)
    assert begun.begun is begun and not begun.is_elastic
    assert canvas.most_widenings == 2 * (most + right)
    hidden = Canvas.of_ids(ids, MASK, initial=initial, handed=left + most)
    assert (hidden.hidden, canvas.hidden) == (right, 0)
    assert hidden.begun.max_tokens == left + initial


def test_a_literal_mask_is_text():
    canvas = Canvas((MASK, 1, MASK), ((2, 1),))
    assert canvas.is_hole.tolist() == [False, False, True]
    assert canvas.pins_end == 2


def laid_out(model: ModelDefaults, tokens: list[int], prompt_len: int, known: int):
    config = resolve(DlmConfig(), None, model)
    config = replace(config, canvas=Canvas.of_ids(tokens, MASK)).sized(99, 100)
    return lay_out(
        config,
        model,
        Limits(100, 100),
        prompt_len=prompt_len,
        num_known=known,
        max_tokens=5,
    )


@pytest.mark.parametrize("model", [MODEL, BLOCKS])
def test_blocks_that_are_written_are_skipped(model: ModelDefaults):
    """Prompt of 4; blocks of 4, of which the second and the third are written."""
    tokens = [MASK, 1, 1, 1, *[1] * 8, 1, MASK, 1]
    layout = laid_out(model, tokens, 4, 4)
    assert layout.first_block == 4
    assert layout.text_end == 19
    assert layout.canvas_from(4) == 19
    assert [layout.block_at(p) for p in (4, 5, 8, 16, 17)] == [4, 16, 16, 16, 16]
    assert [layout.is_written(p) for p in (4, 5, 17, 18)] == [False, True, False, True]
    # A request that returns with its first block.
    assert laid_out(model, tokens, 4, 16).first_block == 16


def test_a_written_first_block_is_not_decided():
    layout = laid_out(MODEL, [1] * 6 + [MASK] * 3, 5, 5)
    assert layout.first_block == 9
    assert layout.num_emitted == 0


def build(options: CanvasOptions, names: Mapping[str, str]) -> Canvas:
    assert options.canvas is not None
    return Canvas.of_ids(options.canvas, MASK)


@pytest.mark.parametrize(
    ("model", "asked", "told"),
    [
        (
            BLOCKS,
            {"tccf": {"trigger": [1], "check": [2]}},
            "cannot be combined with tccf: leave dlm.tccf out",
        ),
        (MODEL, {"growth": "rho_eos"}, "cannot be combined with growth"),
        (MODEL, {"strategy": "levenshtein"}, "deletes and inserts tokens"),
    ],
)
def test_what_it_cannot_be_combined_with(model: ModelDefaults, asked, told: str):
    request = {"dlm": {"canvas": [1, MASK], **asked}}
    with pytest.raises(OptionError, match=told):
        resolve(DlmConfig(), request, model, build)


ON = replace(MODEL, expand_token=5)
ELASTIC = {"canvas": [1, MASK], "holes": "elastic"}


def test_a_request_with_an_elastic_hole_is_decoded_as_published():
    """Whatever the server decodes others by."""
    server = DlmConfig(
        strategy="threshold",
        strategy_config={"threshold": 0.5},
        cache="dual",
        block_length=8,
        steps=3,
        eotp="block",
        growth="daedal",
    )
    plain = resolve(server, None, ON)
    assert (plain.strategy, plain.cache, plain.eotp) == ("threshold", "dual", "block")
    for own, mode in (({}, "entropy"), ({"mode": "margin"}, "margin")):
        asked = {"dlm": ELASTIC | {"strategy_config": own}}
        config = resolve(server, asked, ON, build)
        assert (config.strategy, config.params.mode) == ("static", mode)
        assert (config.cache, config.eotp, config.growth) == ("none", "off", "none")
        assert (config.block_length, config.steps) == (0, None)


@pytest.mark.parametrize(
    ("server", "model", "told"),
    [
        ({}, MODEL, "no expand_token_id"),
        ({}, replace(BLOCKS, expand_token=5), "block after block"),
        ({"frames": "text"}, ON, "cannot be combined with dlm.frames"),
        ({"step_map": True}, ON, "cannot be combined with dlm.step_map"),
        ({"reference_exact": True}, ON, "cannot be combined with reference_exact"),
        ({"record_traces": True}, ON, "--dlm-record-traces"),
    ],
)
def test_where_elastic_holes_are_refused(server, model: ModelDefaults, told: str):
    with pytest.raises(OptionError, match=told):
        resolve(DlmConfig(**server), {"dlm": ELASTIC}, model, build)


def test_looking_ahead_is_left_out():
    asked = {"strategy": "freedave", "strategy_config": {"eager": True}}
    plain = resolve(DlmConfig(), {"dlm": asked}, BLOCKS)
    assert plain.looks_ahead > 0
    own = resolve(DlmConfig(), {"dlm": asked | {"canvas": [1, MASK]}}, BLOCKS, build)
    assert own.looks_ahead == 0
    assert own.canvas == Canvas((1, MASK), ((1, 1),))


def test_an_engine_without_our_front_end_says_so():
    with pytest.raises(ValueError, match="where a request is admitted"):
        resolve(DlmConfig(), {"dlm_canvas": [1, MASK]}, MODEL)
