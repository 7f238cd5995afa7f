# SPDX-License-Identifier: Apache-2.0
"""No page can be found that holds a position that is not final, whatever vLLM calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from engine.block_cases import RULES, BlockCase
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine
from engine.page_ledger import watching
from tiers import fast
from vllm import SamplingParams
from vllm.v1.request import RequestStatus

MODELS = {
    "SDAR-4B-Chat-b16": "blocks",
    "Fast_dLLM_v2_7B": "seeds and sub-blocks",
    "Nemotron-Labs-Diffusion-3B": "a causal context",
}


@pytest.fixture(params=fast(list(MODELS)[1], of=MODELS), scope="module")
def model(
    engines: Callable[..., Engine], tmp_path_factory, request: pytest.FixtureRequest
) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), request.param)


# -- hosts that publish more than vLLM 0.32 does ------------------------------------


@contextmanager
def as_it_is(engine: Engine) -> Iterator[None]:
    yield


@contextmanager
def caching_after_tokens(engine: Engine) -> Iterator[None]:
    """As vLLM 0.33: a running request's pages, once its tokens were appended."""
    scheduler = engine.scheduler
    update = scheduler._update_request_with_output

    def updated(request: Any, *args: Any, **kwargs: Any) -> Any:
        status = request.status
        result = update(request, *args, **kwargs)
        if status == RequestStatus.RUNNING:
            scheduler.kv_cache_manager.cache_blocks(
                request, request.num_computed_tokens - request.num_in_flight_tokens
            )
        return result

    with patch.object(scheduler, "_update_request_with_output", updated):
        yield


@contextmanager
def caching_at_any_time(engine: Engine) -> Iterator[None]:
    """All pages of all requests, by every way, at every turn of a request's life."""
    scheduler = engine.scheduler
    manager = scheduler.kv_cache_manager
    (pages_of,) = manager.coordinator.single_type_managers

    def publish_all() -> None:
        for request in scheduler.requests.values():
            held = len(pages_of.req_to_blocks.get(request.request_id, ()))
            end = min(held * pages_of.block_size, len(request.all_token_ids))
            manager.cache_blocks(request, end)
            manager.coordinator.cache_blocks(request, end)
            pages_of.cache_blocks(request, end, replay_boundaries=[])

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            publish_all()
            result = original(*args, **kwargs)
            publish_all()
            return result

        return called

    with ExitStack() as stack:
        for name in (
            "schedule",
            "_update_request_with_output",
            "_preempt_request",
            "_free_request",
        ):
            wrapped = around(getattr(scheduler, name))
            stack.enter_context(patch.object(scheduler, name, wrapped))
        yield


# -- requests -----------------------------------------------------------------------


STRATEGIES = [*RULES, "freedave", "cut", "two stages"]


def make_request(source: random.Random, known: list[int]) -> tuple[Any, SamplingParams]:
    """Any strategy; blocks in one forward and in many; `known` is a text so far."""
    name = source.choice(STRATEGIES)
    most = source.randint(1, 80)
    dlm: dict[str, Any]
    if name == "freedave":
        dlm = {"strategy": "freedave", "strategy_config": {"drafts": 3}}
    elif name == "cut":
        dlm = {"strategy": "threshold", "eotp": "token", "eotp_threshold": 0.02}
    elif name == "two stages":
        trigger = [source.randrange(128)]
        dlm = {"strategy": "threshold", "tccf": {"trigger": trigger, "check": [7, 8]}}
    else:
        case = BlockCase((), most, name, source.choice([None, 1, 1, 2, 5]))
        dlm = case.params().extra_args["dlm"]
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=most,
        ignore_eos=source.random() < 0.7,
        extra_args={"dlm": dlm},
    )
    return known, sampling


def begin(source: random.Random, texts: list[list[int]]) -> list[int]:
    """A prompt: a few openings, or what was said before and a next question."""
    if texts and source.random() < 0.6:
        said = source.choice(texts)
        cut = source.choice([len(said), len(said), source.randint(1, len(said))])
        start = said[:cut]
    else:
        start = list(make_prompt(120, source.randrange(3)))
        start = start[: source.choice((1, 16, 31, 32, 64, 90, 96))]
    if source.random() < 0.8:
        start += make_prompt(source.randint(1, 20), source.randrange(10**6))
    return start[:160]


def live(engine: Engine, seed: int, count: int) -> int:
    """Requests that join, go on, are preempted and aborted; how many pages were found.

    The ledger is checked before and after everything that the scheduler does.
    """
    source = random.Random(seed)
    texts: list[list[int]] = []
    running: dict[str, list[int]] = {}
    left = count
    with watching(engine) as ledger:
        while left or engine.busy:
            while left and len(running) < 10 and source.random() < 0.4:
                prompt, sampling = make_request(source, begin(source, texts))
                running[engine.add(prompt, sampling)] = list(prompt)
                for waiting in engine.scheduler.waiting:
                    waiting.priority = waiting.priority or source.randint(1, 3)
                left -= 1
            for output in engine.step():
                if output.finished:
                    prompt = running.pop(output.request_id)
                    texts.append([*prompt, *output.outputs[0].token_ids])
            ledger.check()
            chance = source.random()
            if chance < 0.06 and engine.scheduler.running:
                victim = source.choice(engine.scheduler.running)
                engine.preempt(victim.request_id)
            elif chance < 0.1 and running:
                name = source.choice([*running])
                engine.abort(name)
                del running[name]
            elif chance < 0.105:
                engine.llm.reset_prefix_cache(reset_running_requests=True)
            ledger.check()
        return len(ledger.found)


HOSTS = (caching_after_tokens, caching_at_any_time)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_pages_that_can_be_found_are_final(model: BlockEngines, host: Any):
    engine = model(max_num_batched_tokens=4 * BLOCK)
    with host(engine):
        assert live(engine, seed=1, count=40) > 30


ENGINES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "commits alone": {"dlm": {"block_length": BLOCK, "commit": "separate"}},
    "little memory": {"max_num_batched_tokens": 64, "num_gpu_blocks_override": 20},
    "priorities": {"num_gpu_blocks_override": 20, "scheduling_policy": "priority"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", ENGINES)
def test_many_lives(model: BlockEngines, options: str):
    engine = model(**ENGINES[options])
    for host in (as_it_is, caching_after_tokens, caching_at_any_time):
        with host(engine):
            assert live(engine, 2, count=60) > 30
