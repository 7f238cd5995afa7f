# SPDX-License-Identifier: Apache-2.0
"""Think coarse, critic fine: blocks up to a token, then one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import product
from typing import Any

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, params
from reference.block_procedures import generate_blocks
from reference.rules import threshold
from tiers import fast
from vllm.exceptions import VLLMValidationError

CHECK = [7, 8, 9]


MODELS = ("SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B")


@pytest.fixture(scope="module", params=fast(MODELS[0], of=MODELS))
def model(
    request: pytest.FixtureRequest, engines: Callable[..., Engine], tmp_path_factory
) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


BEFORE = {"keep_trigger": True, "always": False, "critic_tokens": 0}
"""Options by which the second stage follows the trigger alone, which stays."""


def decode(model: BlockEngines, known: list[int], block: int, room: int) -> list[int]:
    defaults = model().scheduler.dlm_defaults
    return generate_blocks(
        model.oracle,
        known,
        max_tokens=room,
        block_length=block,
        rule=threshold(0.5),
        origin=defaults.block_origin,
        shift=defaults.shift,
        seeds=defaults.leads_blocks,
        sub_block_length=defaults.sub_block_length if block > 1 else None,
        schedule=defaults.schedule,
        max_model_len=250,
        eos_stop=False,
    ).tokens


def up_to(tokens: list[int], stops: Collection[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens, 1) if token in stops]
    return tokens[: ends[0]] if ends else tokens


def two_stages(
    model: BlockEngines,
    prompt: list[int],
    trigger: list[int],
    max_tokens: int,
    stops: Collection[int] = (),
    *,
    keep_trigger: bool = False,
    always: bool = True,
    critic_tokens: int | None = None,
) -> list[int]:
    """TDAR's procedure: one decode after another."""
    critic = max_tokens // 2 if critic_tokens is None else critic_tokens
    room = max(max_tokens - len(CHECK) - critic, 1) if always else max_tokens
    thought = up_to(decode(model, prompt, BLOCK, room), stops)
    for end in range(len(trigger), len(thought) + 1):
        if thought[end - len(trigger) : end] == trigger:
            text = thought[: end if keep_trigger else end - len(trigger)]
            break
    else:
        if not always:
            return thought
        text = thought[:-1] if thought[-1] in stops else thought
    text = [*text, *CHECK]
    most = max_tokens if critic_tokens == 0 else min(len(text) + critic, max_tokens)
    room = most - len(text)
    rest = decode(model, [*prompt, *text], 1, room) if room > 0 else []
    return [*text, *up_to(rest, stops)][:most]


def request(
    trigger: Any,
    max_tokens: int,
    options: dict[str, Any] | None = None,
    **more: Any,
):
    dlm = {
        "strategy": "threshold",
        "strategy_config": {"threshold": 0.5, "strict": False, "at_least": "best"},
        "tccf": {"trigger": trigger, "check": CHECK, **(options or {})},
    }
    return params(max_tokens, dlm=dlm, ignore_eos=True, **more)


def test_it_is_one_decode_after_another(model: BlockEngines):
    prompts, samplings, wanted = [], [], []
    for options in ({}, {"critic_tokens": 7}, BEFORE):
        # A trigger that comes early, late or never.
        for length, place in ((3, 9), (16, 14), (21, 35), (33, None)):
            prompt = list(make_prompt(length, 3))
            thought = decode(model, prompt, BLOCK, 44)
            trigger = [absent_from(thought) if place is None else thought[place]]
            prompts.append(prompt)
            samplings.append(request(trigger, 44, options))
            wanted.append(two_stages(model, prompt, trigger, 44, **options))
    for _ in range(2):  # once more with pages of both stages to be found
        results = model().run(prompts, samplings)
        assert [result.tokens for result in results] == wanted


def absent_from(thought: list[int]) -> int:
    return next(token for token in range(120) if token not in (*thought, *CHECK))


def test_a_long_trigger_is_dropped_from_what_follows(model: BlockEngines):
    """What was sent of it before it was complete stays with the client."""
    prompt = list(make_prompt(12, 3))
    thought = decode(model, prompt, BLOCK, 27)
    for start in range(3, 15, 3):
        trigger = thought[start : start + 3]
        if thought[:start].count(trigger[0]):
            continue
        wanted = two_stages(model, prompt, trigger, 60)
        assert wanted[: start + 3] == [*thought[:start], *CHECK]
        (result,) = model().run([prompt], [request(trigger, 60)])
        sent = next(k for k in range(4) if result.tokens[start + k :][:3] == CHECK)
        assert sent < 3
        assert result.tokens[start : start + sent] == trigger[:sent]
        others = result.tokens[:start] + result.tokens[start + sent :]
        assert others == wanted[: len(others)]
        assert len(result.tokens) <= 60 and len(others) >= len(wanted) - sent


def test_without_the_trigger_the_second_stage_follows(model: BlockEngines):
    prompt = list(make_prompt(12, 3))
    thought = decode(model, prompt, BLOCK, 40)
    absent = absent_from(thought)
    wanted = two_stages(model, prompt, [absent], 40)
    # 17 tokens of thoughts, the check, and the 20 that the second stage has.
    assert wanted[:20] == [*thought[:17], *CHECK] and len(wanted) == 40
    (result,) = model().run([prompt], [request([absent], 40)])
    assert result.tokens == wanted
    assert result.output.finish_reason == "length"
    only_then = {"always": False}
    (result,) = model().run([prompt], [request([absent], 40, only_then)])
    assert result.tokens == thought


def test_an_end_of_text_ends_thoughts_and_not_the_output(model: BlockEngines):
    prompt = list(make_prompt(21, 3))
    thought = decode(model, prompt, BLOCK, 60)
    end = next(n for n in range(6, 27) if thought[n] not in thought[:n])
    absent, stops = absent_from(thought), [thought[end]]
    wanted = two_stages(model, prompt, [absent], 60, stops)
    assert wanted[: end + 3] == [*thought[:end], *CHECK]
    asked = request([absent], 60, stop_token_ids=stops)
    (result,) = model().run([prompt], [asked])
    assert result.tokens == wanted
    assert result.output.finish_reason == ("stop" if wanted[-1] in stops else "length")
    assert stops[0] not in result.tokens[:-1]
    asked = request([absent], 60, {"always": False}, stop_token_ids=stops)
    (result,) = model().run([prompt], [asked])
    assert result.tokens == thought[: end + 1]
    assert result.output.finish_reason == "stop"


def test_an_output_may_end_with_the_check_text(model: BlockEngines):
    prompt = list(make_prompt(12, 3))
    trigger = decode(model, prompt, BLOCK, 40)[9:10]
    cases = list(product([1, 2, 4, 10, 11, 13, 14], ({}, BEFORE, {"critic_tokens": 0})))
    samplings = [request(trigger, most, options) for most, options in cases]
    results = model().run([prompt] * len(cases), samplings)
    for (most, options), result in zip(cases, results, strict=True):
        assert result.tokens == two_stages(model, prompt, trigger, most, **options)
        assert result.output.finish_reason == "length"


def test_a_second_stage_leaves_thoughts_a_token(model: BlockEngines):
    fits = request([1], 20, {"critic_tokens": 16})
    (result,) = model().run([make_prompt(3)], [fits])
    assert len(result.tokens) == 20 and result.tokens[1:4] == CHECK
    asked = request([1], 20, {"critic_tokens": 17})
    with pytest.raises(VLLMValidationError, match="leave nothing of max_tokens 20"):
        model().run([make_prompt(3)], [asked])


@pytest.mark.parametrize("beyond", [-3, 128])
def test_ids_that_are_no_tokens_are_refused(model: BlockEngines, beyond: int):
    asked = request([1], 20)
    asked.extra_args["dlm"]["tccf"]["check"] = [7, beyond]
    with pytest.raises(VLLMValidationError, match=rf"\[{beyond}\]; valid are 0 to 127"):
        model().run([make_prompt(3)], [asked])


def test_log_probabilities_are_refused(model: BlockEngines):
    with pytest.raises(VLLMValidationError, match="tccf cannot be combined"):
        model().run([make_prompt(3)], [request([1], 20, logprobs=1)])
