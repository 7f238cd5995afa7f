# SPDX-License-Identifier: Apache-2.0
"""What cannot be honoured is a 400 that says so, and harms nobody else."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server.launch import Server

STRATEGIES = ["static", "threshold", "factor", "learn2pd"]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


def xargs(**options: Any) -> dict[str, Any]:
    return {"vllm_xargs": options}


def dlm(**options: Any) -> dict[str, Any]:
    return xargs(dlm=json.dumps(options))


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # id: (options of a request, what the message must hold)
    "unknown strategy": (xargs(dlm_strategy="nope"), ["'nope'", *STRATEGIES]),
    "an option at the top level": (
        {"dlm_strategy": "static"},
        ["dlm_strategy: not read from the top level", '"vllm_xargs"'],
    ),
    "mixtures of tokens": (
        xargs(dlm_strategy="smooth"),
        ["'smooth'", "start it with --dlm-soft-inputs"],
    ),
    "a run that may leave masks": (
        dlm(strategy="dmax", strategy_config={"soft": False, "threshold": 0.95}),
        ["threshold 0.95 is above `sure`, 0.9"],
    ),
    "unknown strategy in JSON": (dlm(strategy="nope"), ["'nope'", *STRATEGIES]),
    "strategy of a wrong type": (xargs(dlm_strategy=3), ["strategy", "string"]),
    "threshold too high": (xargs(dlm_threshold=5), ["threshold", "equal to 2", "5"]),
    "threshold too low": (xargs(dlm_threshold=0), ["threshold", "greater than 0"]),
    "threshold no number": (xargs(dlm_threshold="high"), ["threshold", "number"]),
    "threshold infinite": (xargs(dlm_threshold="inf"), ["threshold", "finite"]),
    "threshold a list": (xargs(dlm_threshold=[0.5]), ["threshold", "number"]),
    "threshold a boolean": (
        dlm(strategy_config={"threshold": True}),
        ["threshold", "number", "boolean"],
    ),
    "parameter misspelt": (
        xargs(dlm_treshold=0.5),
        ["'dlm_treshold'", "Did you mean 'dlm_threshold'?"],
    ),
    "parameter of another strategy": (
        xargs(dlm_strategy="factor", dlm_threshold=0.5),
        ["'dlm_threshold'", "'factor'", "dlm_factor"],
    ),
    "option misspelt in JSON": (dlm(strategi="static"), ["Did you mean 'strategy'?"]),
    "parameter beside the options": (
        dlm(strategy="threshold", threshold=0.5),
        ["put it in strategy_config"],
    ),
    "block length zero": (
        xargs(dlm_block_length=0),
        ["block_length", "an integer from 1 to 1024 or 'canvas'", "0"],
    ),
    "block length too long": (
        xargs(dlm_block_length=2048),
        ["block_length", "from 1 to 1024", "2048"],
    ),
    "block length no integer": (
        xargs(dlm_block_length=8.5),
        ["block_length", "integer", "8.5"],
    ),
    "block length a boolean": (dlm(block_length=True), ["block_length", "integer"]),
    "steps no integer": (xargs(dlm_steps="many"), ["steps", "integer", "'many'"]),
    "unknown cache": (xargs(dlm_cache="most"), ["'vicinity' or 'window'"]),
    "set twice": (
        xargs(dlm_strategy="static", dlm='{"strategy": "static"}'),
        ["'dlm'"],
    ),
    "bad JSON": (xargs(dlm="{"), ["dlm: not valid JSON"]),
    "JSON too deep": (xargs(dlm="[" * 100_000), ["dlm: not valid JSON"]),
    "option without its prefix": (xargs(strategy="static"), ["'dlm_strategy'"]),
    "parameter without its prefix": (
        xargs(threshold=0.5),
        ["'threshold' would be ignored", "'dlm_threshold'", "vllm_xargs.threshold"],
    ),
    "option spelt in another way": ({"vllm_xargs": {"dlm-steps": 4}}, ["'dlm_steps'"]),
    "name of another server": (xargs(gen_length=64), ["'gen_length'", "'max_tokens'"]),
    "name of another server in JSON": (
        dlm(remasking="low_confidence"),
        ["'remasking'", "'strategy'"],
    ),
    "JSON of a list": (xargs(dlm="[1]"), ["an object of options", "list"]),
    "dlm a number": (xargs(dlm=3), ["an object of options", "int"]),
    "bad JSON of parameters": (xargs(dlm_strategy_config="{"), ["not valid JSON"]),
    "canvas limit": (xargs(dlm_max_canvas=64), ["--dlm-max-canvas"]),
    "canvas limit in JSON": (dlm(max_canvas=64), ["--dlm-max-canvas"]),
    "online learning": (xargs(dlm_online_learning=0), ["--dlm-online-learning"]),
    "filter folder": (xargs(dlm_filter_dir="/etc"), ["--dlm-filter-dir"]),
    "traces": (xargs(dlm_record_traces=1), ["--dlm-record-traces"]),
    "filter path": (
        xargs(dlm_strategy="learn2pd", dlm_filter="/etc/passwd"),
        ["filter", "set by the server", "--dlm-strategy-config"],
    ),
    "filter path in JSON": (
        dlm(strategy="learn2pd", strategy_config={"filter": "/etc/passwd"}),
        ["filter", "set by the server"],
    ),
    "whole canvas too wide": (
        xargs(dlm_strategy="saber", dlm_block_length=512),
        ["512", "256", "--dlm-block-length canvas"],
    ),
    "drafts of approximate KV": (
        xargs(dlm_strategy="freedave", dlm_cache="vicinity"),
        ["'freedave'", "'vicinity'", "set cache to 'none' or 'prefix' or 'dual'"],
    ),
    "preset unknown": (
        xargs(dlm_strategy="joint", dlm_preset="fast"),
        ["preset", "default, quality, speed"],
    ),
    "limits crossed": (
        xargs(dlm_strategy="bacd", dlm_lowest=0.9, dlm_highest=0.5),
        ["lowest", "highest"],
    ),
    "frequency table": (
        xargs(dlm_strategy="pc", dlm_frequencies="/etc/passwd"),
        ["frequencies", "set by the server"],
    ),
    "trajectory folder": (xargs(dlm_trajectory_dir="/tmp"), ["--dlm-trajectory-dir"]),
    "second stage of a model without blocks": (
        dlm(tccf={"trigger": "a", "check": "b"}),
        ["tccf", "block"],
    ),
    "options of DiffusionGemma": (
        xargs(diffusion_max_steps=3),
        ["'diffusion_max_steps'", "dlm_"],
    ),
    "output too long": (
        {"max_tokens": 1087},
        ["max_tokens", "1087", "1088", "at most"],
    ),
    "prompt too long": ({"prompt": "Ada Ben " * 600}, ["1088", "prompt"]),
    "presence penalty": ({"presence_penalty": 0.5}, ["presence_penalty", "canvas"]),
    "frequency penalty": ({"frequency_penalty": 0.5}, ["frequency_penalty"]),
    "repetition penalty": ({"repetition_penalty": 1.5}, ["repetition_penalty"]),
    "a grammar": ({"structured_outputs": {"grammar": "a"}}, ["outside of a rule"]),
    "prompt log-probabilities": ({"prompt_logprobs": 1}, ["prompt_logprobs"]),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, ["`echo` with `logprobs`"]),
    "beam search": ({"use_beam_search": True, "n": 2}, ["beam search", "use `n`"]),
    "the best of several": ({"best_of": 2}, ["best_of", "`n`", "vllm-dlm search"]),
    "keys of another engine": (
        {"kv_transfer_params": {"do_remote_decode": True}},
        ["kv_transfer_params", "Remove it"],
    ),
    "greedy choices": ({"n": 2}, ["n must be 1", "greedy"]),
    "too many logprobs": ({"logprobs": 21}, ["21", "20"]),
    "logit bias outside": ({"logit_bias": {"500": 1}}, ["500", "Vocabulary size"]),
    "prompt outside": ({"prompt": [5, 500]}, ["prompt: 500", "ids go from 0 to 127"]),
}

CHAT_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown strategy": CASES["unknown strategy"],
    "bad JSON": CASES["bad JSON"],
    "filter path": CASES["filter path"],
    "presence penalty": CASES["presence penalty"],
    "output too long": ({"max_tokens": 1084}, ["max_tokens", "1084", "at most"]),
    "output too long, new name": (
        {"max_tokens": None, "max_completion_tokens": 1084},
        ["max_completion_tokens is 1084", "max_completion_tokens to at most"],
    ),
    "JSON schema": (
        {"response_format": JSON_SCHEMA},
        ["response_format: the model's tokenizer cannot write any text"],
    ),
    "JSON": (
        {"response_format": {"type": "json_object"}},
        ["response_format: the model's tokenizer cannot write any text"],
    ),
    "prompt log-probabilities": CASES["prompt log-probabilities"],
    "beam search": CASES["beam search"],
}


@pytest.fixture(scope="module")
def healthy_text(server: Server) -> str:
    return server.text(max_tokens=8)


def refuse(ask: Any, options: dict[str, Any]) -> str:
    """The message of a refusal."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**{"max_tokens": 16, **options})
    assert caught.value.status_code == 400
    message = caught.value.body["message"]
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize("name", CASES)
def test_completion_is_refused(server: Server, healthy_text: str, name: str):
    options, fragments = CASES[name]
    message = refuse(server.complete, options)
    assert not [part for part in fragments if part not in message], message
    assert server.text(max_tokens=8) == healthy_text


@pytest.mark.parametrize("name", CHAT_CASES)
def test_chat_is_refused(server: Server, healthy_text: str, name: str):
    options, fragments = CHAT_CASES[name]
    message = refuse(server.chat, options)
    assert not [part for part in fragments if part not in message], message
    assert server.text(max_tokens=8) == healthy_text


@pytest.mark.parametrize("route", ["completion", "chat", "response"])
def test_a_stream_is_refused_before_it_begins(server: Server, route: str):
    options, fragments = CASES["unknown strategy"]
    with pytest.raises(openai.BadRequestError) as caught:
        if route == "response":
            server.client.responses.create(
                model=server.model, input="Copy [Ada]", stream=True, extra_body=options
            )
        else:
            (server.chat if route == "chat" else server.complete)(
                stream=True, max_tokens=16, **options
            )
    assert not [part for part in fragments if part not in str(caught.value)]


def test_refusals_change_no_other_request(server: Server):
    """Requests that run while every case above is refused give what they gave alone."""

    def ask(number: int) -> str:
        return server.text(
            "Spell ngkkkx backwards",
            vllm_xargs={"dlm_strategy": ("static", "threshold")[number % 2]},
            logit_bias={"0": -100, "5": -100},
            max_tokens=64,
            temperature=0.8,
            seed=number,
        )

    alone = [ask(number) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, number) for number in range(2)]
        for options, _ in CASES.values():
            refuse(server.complete, options)
        for options, _ in CHAT_CASES.values():
            refuse(server.chat, options)
        assert [future.result() for future in running] == alone
    server.wait_until_idle()
