# SPDX-License-Identifier: Apache-2.0
"""Real engines in this process, and what they finished, in terms of the oracle."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput

DUMMY_TEXT = {"prompt_token_ids": [1]}


@dataclass(frozen=True)
class Finished:
    """One finished output sequence."""

    tokens: list[int]
    forwards: int
    """Model forwards this sequence took part in."""
    output: CompletionOutput = field(compare=False, repr=False)


def finished(output: CompletionOutput) -> Finished:
    metrics = output.spec_decode_metrics
    assert metrics is not None
    return Finished(list(output.token_ids), sum(metrics.histogram), output)


def params(max_tokens: int, *, dlm: dict[str, Any] | None = None, **options):
    """Greedy sampling parameters; `dlm` are the request's own options."""
    options = {"temperature": 0.0} | options
    if dlm is not None:
        options["extra_args"] = {"dlm": dlm}
    return SamplingParams(max_tokens=max_tokens, **options)


class Engine:
    """A vLLM engine whose steps a test may drive itself."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._count = 0

    # -- whole runs --------------------------------------------------------

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[Finished]:
        """Decode all prompts together; the first output sequence of each."""
        return [
            finished(result.outputs[0]) for result in self.outputs(prompts, sampling)
        ]

    def outputs(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[RequestOutput]:
        return self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            sampling,
            use_tqdm=False,
        )

    # -- step by step ------------------------------------------------------

    def add(self, prompt: Sequence[int], sampling: SamplingParams) -> str:
        """Enqueue a request; its id."""
        self._count += 1
        request_id = f"test-{self._count}"
        self.llm.llm_engine.add_request(
            request_id, {"prompt_token_ids": list(prompt)}, sampling
        )
        return request_id

    def step(self) -> list[RequestOutput]:
        return self.llm.llm_engine.step()

    def abort(self, request_id: str) -> None:
        self.llm.llm_engine.abort_request([request_id])

    @property
    def busy(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def flush(self) -> None:
        """One step more: the worker hears of finished requests with the next batch."""
        assert not self.busy
        self.step()

    def drive(self, meddle: Callable[[int], None]) -> dict[str, RequestOutput]:
        """Step until nothing is left, calling `meddle(step)` between steps.

        Returns:
            What each request finished with, by its id.
        """
        done = {}
        step = 0
        while self.busy:
            for output in self.step():
                if output.finished:
                    done[output.request_id] = output
            meddle(step)
            step += 1
        return done

    def preempt(self, request_id: str) -> None:
        """What the scheduler does to a running request when pages run out."""
        request = self.scheduler.requests[request_id]
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, time.monotonic())

    def run_short_of_pages(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        watch: Callable[[int], None] = lambda step: None,
    ) -> tuple[list[RequestOutput], set[str]]:
        """Decode requests together of which some lose their pages on the way.

        Args:
            watch: called between steps, with their number.

        Returns:
            What they finished with, in their order; ids of those that were preempted.
        """
        preempted: set[str] = set()

        def note(step: int) -> None:
            watch(step)
            waiting = self.scheduler.waiting
            preempted.update(r.request_id for r in waiting if r.num_preemptions)

        ids = [self.add(*one) for one in zip(prompts, sampling, strict=True)]
        done = self.drive(note)
        assert preempted, "pages sufficed for all"
        return [done[i] for i in ids], preempted

    # -- insides -----------------------------------------------------------

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self) -> Any:
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner

    @property
    def free_pages(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def drive(engine: Engine, meddle: Callable[[int], None]) -> dict[str, Finished]:
    """Step until nothing is left, calling `meddle(step)` between steps."""
    done = engine.drive(meddle)
    return {name: finished(output.outputs[0]) for name, output in done.items()}


def end(engines: dict[Any, Any]) -> None:
    """Let go of engines, with one garbage collection for all.

    vLLM collects twice for each, which takes seconds where all tests are imported.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        patch.setattr(gc, "unfreeze", lambda: None)
        engines.clear()
    gc.unfreeze()
    gc.collect()
