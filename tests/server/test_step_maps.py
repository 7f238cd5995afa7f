# SPDX-License-Identifier: Apache-2.0
"""Step maps over HTTP: each choice of an answer has its own."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from server.launch import Server

ASKS = {"dlm_step_map": True}
FIELDS = {"steps", "logprobs", "edited", "beyond"}


def check(found: dict[str, Any], num_tokens: int) -> None:
    assert set(found) == FIELDS
    for name in ("steps", "logprobs", "edited"):
        assert len(found[name]) == num_tokens, name
    assert min(found["steps"]) == 0
    assert all(isinstance(step, int) for step in found["steps"])
    assert all(value <= 0 for value in found["logprobs"])
    assert not any(found["edited"])


def test_completion(server: Server):
    answer = server.complete(
        max_tokens=40, ignore_eos=True, logprobs=0, vllm_xargs=ASKS
    )
    (choice,) = answer.choices
    check(choice.step_map, 40)
    assert choice.step_map["logprobs"] == pytest.approx(choice.logprobs.token_logprobs)
    assert getattr(choice, "routed_experts", None) is None


def test_chat(server: Server):
    answer = server.chat(max_tokens=30, vllm_xargs=ASKS, return_token_ids=True)
    (choice,) = answer.choices
    check(choice.step_map, len(choice.token_ids))


def test_who_does_not_ask_gets_none(server: Server):
    for answer in (server.complete(max_tokens=4), server.chat(max_tokens=4)):
        assert not hasattr(answer.choices[0], "step_map")


def test_each_choice_has_its_own(server: Server):
    """Two prompts, two choices each; then three choices of a chat."""
    prompts = ["Copy [Ada, Ben]", "Spell ngkkkx backwards"]
    options = {"temperature": 1, "seed": 3, "return_token_ids": True}
    nested = {"dlm": json.dumps({"step_map": True, "strategy": "factor"})}
    answer = server.complete(prompts, n=2, max_tokens=30, vllm_xargs=nested, **options)
    assert len(answer.choices) == 4
    for i, choice in enumerate(answer.choices):
        check(choice.step_map, len(choice.token_ids))
        alone = server.complete(
            prompts[i // 2],
            max_tokens=30,
            vllm_xargs=nested,
            **options | {"seed": 3 + i % 2},
        )
        assert alone.choices[0].token_ids == choice.token_ids
        assert alone.choices[0].step_map["steps"] == choice.step_map["steps"]
    answer = server.chat(n=3, max_tokens=30, vllm_xargs=ASKS, **options)
    for choice in answer.choices:
        check(choice.step_map, len(choice.token_ids))


def test_a_stream_is_refused(server: Server):
    for ask in (server.complete, server.chat):
        with pytest.raises(openai.BadRequestError, match="set `stream` to false"):
            ask(stream=True, max_tokens=4, vllm_xargs=ASKS)


def test_an_answer_is_replayed(server: Server):
    options = {"max_tokens": 60, "temperature": 1, "seed": 5, "return_token_ids": True}
    (choice,) = server.chat(vllm_xargs=ASKS, **options).choices
    found = choice.step_map
    again = {
        "strategy": "replay",
        "strategy_config": {"recorded_steps": found["steps"] + found["beyond"]},
        "step_map": True,
    }
    xargs = {"dlm": json.dumps(again)}
    (other,) = server.chat(vllm_xargs=xargs, **options).choices
    assert other.token_ids == choice.token_ids
    assert other.step_map["steps"] == found["steps"]


def test_the_log_is_the_servers(server: Server):
    with pytest.raises(openai.BadRequestError, match="--dlm-trajectory-dir"):
        server.complete(max_tokens=4, vllm_xargs={"dlm_trajectory_dir": "/tmp"})
