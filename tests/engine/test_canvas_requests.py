# SPDX-License-Identifier: Apache-2.0
"""What a canvas from the request is beside tokens: suffix, holes, maps, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine.block_engines import BlockEngines
from engine.cases import MASK_ID, Case, make_prompt
from engine.harness import Engine, Finished, finished
from engine.test_own_canvas import make_canvas
from reference.llada import TinyLLaDA
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from vllm_dlm.entrypoints.step_maps import step_map

EOS = 121
"""Of the random checkpoints."""

PROMPT = make_prompt(7)


def ids(*parts: int | list[int]) -> list[int]:
    """Token ids; a number stands for so many masks."""
    canvas: list[int] = []
    for part in parts:
        canvas += [MASK_ID] * part if isinstance(part, int) else part
    return canvas


def asking(dlm: dict[str, Any], **more: Any) -> SamplingParams:
    options = {"temperature": 0.0} | more
    return SamplingParams(extra_args={"dlm": {"block_length": 8} | dlm}, **options)


def run(engine: Engine, dlm: dict[str, Any], **more: Any) -> Finished:
    return engine.run([PROMPT], asking(dlm, **more))[0]


def test_a_suffix_is_seen_and_not_handed_out(engine: Engine, oracle: TinyLLaDA):
    suffix = list(make_prompt(11, 3))
    result = run(engine, {"suffix": suffix}, max_tokens=20)
    as_canvas = run(engine, {"canvas": ids(20, suffix)})
    assert result.tokens == as_canvas.tokens[:20]
    assert EOS not in result.tokens
    assert result.output.finish_reason == "length"
    without = run(engine, {}, max_tokens=20, ignore_eos=True)
    assert result.tokens != without.tokens


def test_a_suffix_streams_the_hole_alone(engine: Engine):
    sampling = asking({"suffix": [5, 6, 7]}, max_tokens=20)
    whole = engine.run([PROMPT], sampling)[0].tokens
    sampling.output_kind = RequestOutputKind.DELTA
    engine.add(PROMPT, sampling)
    tokens: list[int] = []
    while engine.busy:
        for output in engine.step():
            tokens += output.outputs[0].token_ids
    assert tokens == whole


def test_lengths_that_may_be_left_out(engine: Engine):
    canvas = ids([1, 2], 5, [3])
    for length in (None, 8, 16):  # 16 is vLLM's own default
        result = run(engine, {"canvas": canvas}, max_tokens=length)
        assert len(result.tokens) == 8


def test_ends_that_the_request_writes_end_nothing(engine: Engine):
    """But the last one, behind which nothing is written by the request."""
    canvas = ids([EOS], 3, [5, EOS, 6], 4)
    result = run(engine, {"canvas": canvas}, ignore_eos=False)
    assert result.tokens[:1] == [EOS] and result.tokens[4:7] == [5, EOS, 6]
    last = run(engine, {"canvas": ids(3, [5, EOS], 4)})
    assert last.tokens[3:] == [5, EOS]
    assert last.output.finish_reason == "stop"


def test_a_literal_mask_of_the_request_is_text(engine: Engine):
    result = run(engine, {"canvas_text": r"<|mdm_mask|>{{4}}<|mdm_mask|>"})
    assert result.tokens[0] == result.tokens[5] == MASK_ID
    assert MASK_ID not in result.tokens[1:5]


def test_holes_shrink(engine: Engine):
    """A bias makes ends likely; what is behind them in a hole is left out."""
    canvas = ids([1, 2], 6, [3, 4], 7, [5], 5)
    more = {"logit_bias": {EOS: 6.0}, "logprobs": 2}
    exact = run(engine, {"canvas": canvas, "holes": "exact"}, **more)
    assert EOS not in exact.tokens[:18]
    shrunk = run(engine, {"canvas": canvas, "holes": "shrink"}, **more)
    assert len(shrunk.tokens) < len(exact.tokens)
    assert EOS not in shrunk.tokens[:-1]
    # What the request has written is there, in order.
    rows = shrunk.output.routed_experts
    offsets = rows[: len(shrunk.tokens), -1].astype(int).tolist()
    at = dict(zip(offsets, shrunk.tokens, strict=True))
    assert {i: at[i] for i in (0, 1, 8, 9, 17)} == {0: 1, 1: 2, 8: 3, 9: 4, 17: 5}
    for start, length in ((2, 6), (10, 7)):
        inside = [i for i in offsets if start <= i < start + length]
        assert inside == list(range(start, start + len(inside)))
    assert len(shrunk.output.logprobs) == len(shrunk.tokens)
    for token, options in zip(shrunk.tokens, shrunk.output.logprobs, strict=True):
        assert token in options


def test_maps_and_logprobs_of_what_the_request_writes(engine: Engine):
    canvas = ids([1, 2, *make_prompt(20, 5)], 6, [3, 4], 7)
    result = run(
        engine,
        {"canvas": canvas, "step_map": True},
        logprobs=2,
        ignore_eos=True,
    )
    found = step_map(result.output)
    is_pin = [token != MASK_ID for token in canvas]
    assert [step == -1 for step in found.steps] == is_pin
    assert not any(found.edited)
    for token, options, pin, value in zip(
        result.tokens, result.output.logprobs, is_pin, found.logprobs, strict=True
    ):
        if pin:
            assert {key: one.logprob for key, one in options.items()} == {token: 0.0}
            assert value == 0.0
        else:
            assert options[token].logprob < 0
            assert value == pytest.approx(options[token].logprob)
    # And a replay of that map writes the same.
    again = run(
        engine,
        {
            "canvas": canvas,
            "strategy": "replay",
            "strategy_config": {"recorded_steps": found.steps},
        },
        ignore_eos=True,
    )
    assert (again.tokens, again.forwards) == (result.tokens, result.forwards)


def test_several_outputs(engine: Engine):
    canvas = ids([1], 9, [2], 4)
    (result,) = engine.outputs(
        [PROMPT], asking({"canvas": canvas}, n=3, temperature=1.0, seed=1)
    )
    texts = [finished(output).tokens for output in result.outputs]
    assert all(text[0] == 1 and text[10] == 2 for text in texts)
    assert len({tuple(text) for text in texts}) > 1


def test_a_cut_spares_what_the_request_writes(engine: Engine):
    """End-of-text prediction in each of its modes, where ends are likely."""
    canvas = ids(12, [1, 2, 3], 12, [4], 14)
    for mode in ("token", "block", "canvas"):
        dlm = {"canvas": canvas, "eotp": mode, "eotp_threshold": 0.0}
        result = run(engine, dlm, logit_bias={EOS: 3.0})
        assert result.tokens[12:15] == [1, 2, 3] and result.tokens[27] == 4, mode


def test_min_tokens_and_stop_strings(engine: Engine):
    canvas = ids(3, [1, 2, 3], 12)
    free = run(engine, {"canvas": canvas}, ignore_eos=True)
    word = engine.llm.get_tokenizer().decode([2])
    stopped = run(engine, {"canvas": canvas}, stop=[word], ignore_eos=True)
    assert stopped.tokens[:6] == free.tokens[:6]
    longer = run(engine, {"canvas": canvas}, min_tokens=14, logit_bias={EOS: 30.0})
    assert longer.tokens[:14].count(EOS) == 0 and longer.tokens[14] == EOS


@pytest.mark.parametrize(
    ("dlm", "more", "told"),
    [
        ({"canvas": [1, 2]}, {}, ["dlm.canvas", "no hole", str(MASK_ID)]),
        ({"canvas": []}, {}, ["no hole"]),
        ({"canvas": ids(3, [500])}, {}, ["500", "no token", "Vocabulary"]),
        ({"canvas": ids(3, [-1])}, {}, ["-1", "no token"]),
        ({"canvas": ["a"]}, {}, ["dlm.canvas"]),
        ({"canvas": 5}, {}, ["dlm.canvas"]),
        ({"canvas": ids(3)}, {"max_tokens": 4}, ["3 positions", "max_tokens is 4"]),
        ({"canvas": ids(250)}, {}, ["250", "prompt has 7"]),
        ({"canvas": ids(300)}, {}, ["300 positions", "context length is 256"]),
        ({"canvas_text": "x {{300}}"}, {}, ["dlm.canvas_text", "256"]),
        ({"canvas_text": "x {{a}}"}, {}, ["dlm.canvas_text", "{{city:4}}"]),
        ({"canvas_text": "x"}, {}, ["no hole"]),
        ({"canvas": ids(3), "suffix": "x"}, {}, ["dlm.canvas", "dlm.suffix", "one"]),
        ({"pinned": False}, {}, ["dlm.pinned", "canvas_text"]),
        ({"holes": "shrink"}, {}, ["dlm.holes"]),
        ({"canvas": ids(3), "holes": "wide"}, {}, ["exact", "shrink"]),
        ({"suffix": []}, {}, ["empty"]),
        ({"suffix": "x"}, {"max_tokens": None}, ["dlm.suffix", "max_tokens"]),
        ({"suffix": [1] * 300}, {}, ["300 tokens", "256"]),
        ({"canvas": ids(3), "growth": "daedal"}, {}, ["growth"]),
        ({"canvas": ids(3), "reference_exact": True}, {}, ["reference_exact"]),
        ({"canvas": ids(3), "strategy": "levenshtein"}, {}, ["levenshtein"]),
        ({"canvas": ids(3)}, {"min_tokens": 5, "max_tokens": 16}, ["min_tokens", "5"]),
        (
            {"canvas": ids(3, [1], 2), "holes": "shrink"},
            {"stop": ["a"]},
            ["stop", "exact"],
        ),
        (
            {"canvas": ids(3, [1], 2)},
            {"allowed_token_ids": [EOS]},
            ["allowed_token_ids", "shrink"],
        ),
    ],
    ids=str,
)
def test_refused(
    engine: Engine, dlm: dict[str, Any], more: dict[str, Any], told: list[str]
):
    with pytest.raises(VLLMValidationError) as caught:
        run(engine, dlm, **more)
    for text in told:
        assert text in str(caught.value)


def test_a_canvas_wider_than_the_servers_is_refused(small_engine: Engine):
    with pytest.raises(VLLMValidationError, match=r"40 positions.*is 32.*max-canvas"):
        run(small_engine, {"canvas": ids(40)})


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")


def test_block_models_refuse_a_suffix(sdar: BlockEngines):
    sampling = SamplingParams(extra_args={"dlm": {"suffix": [5]}})
    with pytest.raises(VLLMValidationError, match="does not see"):
        sdar().run([PROMPT], sampling)


def test_block_models_compute_long_runs_in_parts(sdar: BlockEngines):
    """What a request writes behind a block may have more rows than a forward."""
    engine, small = sdar(), sdar(max_num_batched_tokens=48)
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    given = make_canvas(40, "tail", 1) + tuple(make_prompt(130, 2)) + (None,) * 20
    canvas = [mask_id if token is None else token for token in given]
    sampling = SamplingParams(temperature=0.0, extra_args={"dlm": {"canvas": canvas}})
    (whole,) = engine.run([PROMPT], sampling)
    (parts,) = small.run([PROMPT], sampling)
    assert parts.tokens == whole.tokens
    case = Case(PROMPT, max_tokens=len(given), canvas=given)
    assert all(
        want is None or got == want
        for got, want in zip(whole.tokens, case.canvas, strict=False)
    )
