# SPDX-License-Identifier: Apache-2.0
"""A request's own strategy and options, over HTTP, and what they cost.

vLLM's diffusion metrics count the work: denoise steps (forwards) and canvas positions
tell which strategy, block length and cache policy a request really had.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from server.launch import Server, until

QUESTION = "Spell ngkkkx backwards"
UNKNOWN_TOKEN = "6"
"""<unk>: in no training text."""

Xargs = dict[str, Any]


class Work(NamedTuple):
    """What requests cost."""

    steps: float
    positions: float
    tokens: float


def work_so_far(server: Server) -> Work:
    return Work(
        *server.metrics(
            "diffusion_num_denoising_steps_total",
            "diffusion_num_canvas_positions_total",
            "diffusion_num_committed_tokens_total",
        )
    )


@pytest.fixture
def cost(server: Server) -> Callable[..., Work]:
    """`cost(max_tokens, **xargs)`: the work of one request of full length."""

    def measure(
        max_tokens: int, *, logit_bias: dict[str, float] | None = None, **xargs: Any
    ) -> Work:
        server.wait_until_idle()
        before = work_so_far(server)

        def spent() -> Work:
            now = work_so_far(server)
            return Work(*(b - a for a, b in zip(before, now, strict=True)))

        server.complete(
            QUESTION,
            max_tokens=max_tokens,
            ignore_eos=True,
            logit_bias=logit_bias,
            vllm_xargs=xargs,
        )
        # A reply may be faster than the metrics of its last step.
        until(lambda: spent().tokens >= max_tokens, "tokens are missing in the metrics")
        return spent()

    return measure


# -- options take effect ------------------------------------------------------


@pytest.mark.slow
def test_static_costs_a_step_per_token(cost: Callable[..., Work]):
    assert cost(32, dlm_strategy="static") == Work(32, 32 * 32, 32)
    # The canvas is whole blocks, all of it is evaluated in each step; the second block
    # ends with the last token that was asked for.
    work = cost(40, dlm_strategy="static")
    assert 32 + 8 <= work.steps <= 64
    assert work.positions == work.steps * 64


def test_steps_over_the_whole_canvas(cost: Callable[..., Work]):
    assert cost(64, dlm_strategy="static", dlm_steps=8) == Work(8, 8 * 64, 64)


def test_threshold(cost: Callable[..., Work]):
    # With 128 tokens in the vocabulary the best one is at least 1/128 probable.
    assert cost(64, dlm_threshold=0.001).steps == 2
    assert cost(64, dlm_threshold=1.5).steps == 64


@pytest.mark.slow
def test_factor(cost: Callable[..., Work]):
    assert cost(64, dlm_strategy="factor", dlm_factor=100).steps == 2
    # A token that the model itself finds improbable.
    bias = {UNKNOWN_TOKEN: 100.0}
    unsure = cost(64, dlm_strategy="factor", dlm_factor=0.1, logit_bias=bias)
    assert unsure.steps == 64


def test_learn2pd(cost: Callable[..., Work]):
    """Whatever its filter says, a step writes what the schedule wants at least."""
    work = cost(64, dlm_strategy="learn2pd", dlm_eotp="off", dlm_steps=4)
    assert 2 <= work.steps <= 4
    assert work.tokens == 64


def test_block_length(cost: Callable[..., Work]):
    assert cost(64, dlm_block_length=8, dlm_threshold=0.001).steps == 8
    assert cost(64, dlm_block_length=64, dlm_threshold=0.001).steps == 1


def test_cache(cost: Callable[..., Work]):
    """Two blocks of 16, 16 steps each: the first of a block computes everything."""
    xargs = {"dlm_strategy": "static", "dlm_block_length": 16}
    rest = 15 * 32 + 15 * 16
    wanted = {"none": 32 * 32, "prefix": 2 * 32 + rest, "dual": 2 * 32 + 2 * 15 * 16}
    for cache, positions in wanted.items():
        assert cost(32, **xargs, dlm_cache=cache) == Work(32, positions, 32), cache


def test_options_as_json_text(cost: Callable[..., Work]):
    options: Xargs = {
        "strategy": "threshold",
        "strategy_config": {"threshold": 0.001},
        "block_length": 16,
        "cache": "dual",
    }
    assert cost(64, dlm=json.dumps(options)).steps == 4
    # Beside flat keys, for what it leaves open.
    del options["block_length"]
    assert cost(64, dlm=json.dumps(options), dlm_block_length=8).steps == 8
    # A flat key may hold JSON too.
    config = json.dumps({"factor": 100})
    assert cost(64, dlm_strategy="factor", dlm_strategy_config=config).steps == 2


def test_chat_takes_the_same_options(server: Server):
    def ask(**xargs: Any) -> str:
        reply = server.chat(QUESTION, max_tokens=64, ignore_eos=True, vllm_xargs=xargs)
        return reply.choices[0].message.content

    flat = ask(dlm_strategy="static", dlm_mode="left_to_right", dlm_block_length=8)
    config = {"mode": "left_to_right"}
    nested = {"strategy": "static", "block_length": 8, "strategy_config": config}
    assert ask(dlm=json.dumps(nested)) == flat


# -- together --------------------------------------------------------------------


def test_two_strategies_at_once(server: Server):
    """Requests that decode differently share batches and do not disturb each other."""
    bias = {"logit_bias": {"0": -100, "5": -100}}
    requests: list[dict[str, Any]] = [
        {"vllm_xargs": {"dlm_strategy": "static"}, "max_tokens": 64, **bias},
        {"vllm_xargs": {"dlm_threshold": 0.5}, "max_tokens": 80, **bias},
        {"vllm_xargs": {"dlm_strategy": "factor", "dlm_block_length": 16}, **bias},
        {"vllm_xargs": {"dlm_strategy": "learn2pd"}, "max_tokens": 80},
        {
            "vllm_xargs": {"dlm_strategy": "static", "dlm_cache": "dual"},
            "max_tokens": 64,
            "temperature": 0.8,
            "seed": 3,
        },
        {"vllm_xargs": {"dlm_cache": "prefix"}, "max_tokens": 64, "seed": 4, **bias},
    ]

    def ask(number: int) -> list[int]:
        options = {"max_tokens": 48, **requests[number]}
        prompt = f"{QUESTION} {number}"
        reply = server.complete(prompt, return_token_ids=True, **options)
        return reply.choices[0].token_ids

    alone = [ask(number) for number in range(len(requests))]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(ask, range(len(requests))))
    assert together == alone
