# SPDX-License-Identifier: Apache-2.0
"""Think coarse, critic fine: blocks up to a token, then one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, params
from reference.block_procedures import generate_blocks
from reference.rules import threshold
from vllm.exceptions import VLLMValidationError

CHECK = [7, 8, 9]
NEVER = [-1]


@pytest.fixture(scope="module", params=["SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B"])
def model(
    request: pytest.FixtureRequest, engines: Callable[..., Engine], tmp_path_factory
) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


def two_stages(
    model: BlockEngines, prompt: list[int], trigger: list[int], max_tokens: int
) -> list[int]:
    """TDAR's procedure: one decode after another."""
    defaults = model().scheduler.dlm_defaults

    def decode(known: list[int], block: int, room: int) -> list[int]:
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

    thought = decode(prompt, BLOCK, max_tokens)
    for end in range(len(trigger), len(thought) + 1):
        if thought[end - len(trigger) : end] == trigger:
            text = [*thought[:end], *CHECK]
            room = max_tokens - len(text)
            rest = decode([*prompt, *text], 1, room) if room > 0 else []
            return [*text, *rest][:max_tokens]
    return thought


def request(trigger: Any, max_tokens: int, **more: Any):
    dlm = {
        "strategy": "threshold",
        "strategy_config": {"threshold": 0.5, "strict": False, "at_least": "best"},
        "tccf": {"trigger": trigger, "check": CHECK},
    }
    return params(max_tokens, dlm=dlm, ignore_eos=True, **more)


@pytest.mark.parametrize("length", [1, 2])
def test_it_is_one_decode_after_another(model: BlockEngines, length: int):
    prompts = [list(make_prompt(number, 3)) for number in (3, 10, 16, 21, 33)]
    samplings, wanted = [], []
    for number, prompt in enumerate(prompts):
        thought = two_stages(model, prompt, NEVER, 60)
        trigger = thought[9 + 8 * number :][:length]
        samplings.append(request(trigger, 60))
        wanted.append(two_stages(model, prompt, trigger, 60))
        assert wanted[-1] != thought
    for _ in range(2):  # once more with pages of both stages to be found
        results = model().run(prompts, samplings)
        assert [result.tokens for result in results] == wanted


def test_without_the_trigger_nothing_happens(model: BlockEngines):
    prompt = list(make_prompt(12, 3))
    thought = two_stages(model, prompt, NEVER, 40)
    absent = next(token for token in range(200) if token not in thought)
    (result,) = model().run([prompt], [request([absent], 40)])
    assert result.tokens == thought


@pytest.mark.parametrize("max_tokens", [10, 11, 13, 14])
def test_an_output_may_end_with_the_check_text(model: BlockEngines, max_tokens: int):
    prompt = list(make_prompt(12, 3))
    trigger = two_stages(model, prompt, NEVER, 40)[8:10]
    wanted = two_stages(model, prompt, trigger, max_tokens)
    (result,) = model().run([prompt], [request(trigger, max_tokens)])
    assert result.tokens == wanted
    assert result.output.finish_reason == "length"


@pytest.mark.parametrize("beyond", [-3, 128])
def test_ids_that_are_no_tokens_are_refused(model: BlockEngines, beyond: int):
    asked = request([1], 20)
    asked.extra_args["dlm"]["tccf"]["check"] = [7, beyond]
    with pytest.raises(VLLMValidationError, match=rf"\[{beyond}\]; valid are 0 to 127"):
        model().run([make_prompt(3)], [asked])


def test_log_probabilities_are_refused(model: BlockEngines):
    with pytest.raises(VLLMValidationError, match="tccf cannot be combined"):
        model().run([make_prompt(3)], [request([1], 20, logprobs=1)])
