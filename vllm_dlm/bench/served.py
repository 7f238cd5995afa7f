# SPDX-License-Identifier: Apache-2.0
"""vLLM under test: a diffusion model through this package, DiffusionGemma through
vLLM's own code, or an autoregressive model.

As a server has it (`AsyncLLM`: front end, engine and worker are processes of their own)
or, "offline", as `vllm.LLM` has it in one process, which costs less where there is one
core. Both are driven in a closed loop: a request that ends makes room for the next.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vllm_dlm.bench import clock, step_costs
from vllm_dlm.bench.engine import Answer, Costs, Counts, Work, closed_loop

CPU_PAGE = 128
"""Tokens in a KV page of vLLM on a CPU."""


class _Record:
    """When the tokens of one request came."""

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.tokens: list[int] = []
        self.first = self.last = 0.0
        self.first_tokens = 0
        self.forwards: int | None = None

    def add(self, output: Any) -> None:
        """Take an output of vLLM, with the tokens since the one before."""
        completion = output.outputs[0]
        if completion.token_ids:
            self.last = time.perf_counter() - self.sent
            if not self.tokens:
                self.first, self.first_tokens = self.last, len(completion.token_ids)
            self.tokens += completion.token_ids
        if completion.spec_decode_metrics is not None:
            self.forwards = sum(completion.spec_decode_metrics.histogram)

    def answer(self, by_token: bool) -> Answer:
        # An autoregressive model writes one token in each forward.
        forwards = len(self.tokens) if by_token else self.forwards
        return Answer(self.tokens, self.first, self.first_tokens, self.last, forwards)


class VllmEngine:
    """vLLM with a model, started with the benchmark's options and the user's.

    Args:
        engine_options: further arguments of vLLM's `EngineArgs`.
        mode: "serve" or "offline".
        step_times: time forwards and steps in the worker; see `clock`.
        costs_steps: be able to say what steps cost; see `step_costs`.
    """

    by_token = False
    """Whether each forward of a request writes one token."""
    has_options = True
    """Whether requests may have options of this package."""

    def __init__(
        self,
        engine_options: Mapping[str, Any],
        mode: str,
        step_times: bool,
        costs_steps: bool = False,
    ) -> None:
        self.engine_options = engine_options
        self.mode = mode
        self.step_times = step_times
        self.costs_steps = costs_steps
        self.count = 0

    def start(self, model: str, options: Mapping[str, Any]) -> None:
        """Start vLLM; see `Engine.start`."""
        arguments: dict[str, Any] = {
            "model": model,
            "dtype": options["dtype"],
            "seed": options["seed"],
            "max_model_len": options["max_length"],
            "max_num_seqs": options["max_concurrency"],
            # What ends a text, the tokenizer knows; random weights have none.
            "skip_tokenizer_init": not options["ends_texts"],
            "disable_log_stats": True,
            # Repeated prompts would be answered from it.
            "enable_prefix_caching": False,
        }
        if self.step_times or self.costs_steps:
            wanted = step_costs if self.costs_steps else clock
            arguments["worker_extension_cls"] = wanted.EXTENSION
        arguments |= self._own_arguments(options)
        arguments |= self.engine_options
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(self.mode == "serve"))
        if self.mode == "serve":
            self._start_server(arguments)
        else:
            from vllm import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            self.engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))

    def _own_arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What this kind of engine needs besides."""
        return {}

    def _start_server(self, arguments: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.loop = asyncio.new_event_loop()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

        self.engine = self.loop.run_until_complete(start())

    def generate(
        self, prompts: Sequence[Sequence[int]], work: Work, on_answer: Callable[[], Any]
    ) -> list[Answer]:
        """Answer all prompts; see `Engine.generate`."""
        sampling = self.sampling_params(work)
        if self.mode == "offline":
            return self._step_through(prompts, work, sampling, on_answer)
        return self.loop.run_until_complete(
            self._serve(prompts, work, sampling, on_answer)
        )

    def sampling_params(self, work: Work) -> Any:
        """What vLLM is asked with each prompt, the options of `work` among it."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = {
            "strategy": work.strategy,
            "strategy_config": dict(work.strategy_config),
            "cache": work.cache,
            "cache_config": dict(work.cache_config),
            "block_length": work.block_length,
            "steps": work.scheduled_steps,
        }
        return SamplingParams(
            temperature=work.temperature,
            max_tokens=work.max_tokens,
            ignore_eos=work.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"dlm": options} if self.has_options else None,
        )

    async def _serve(
        self,
        prompts: Sequence[Sequence[int]],
        work: Work,
        sampling: Any,
        on_answer: Callable[[], Any],
    ) -> list[Answer]:
        async def ask(prompt: Sequence[int]) -> Answer:
            record = _Record()
            stream = self.engine.generate(
                {"prompt_token_ids": list(prompt)}, sampling, self._new_id()
            )
            async for output in stream:
                record.add(output)
            return record.answer(self.by_token)

        return await closed_loop(prompts, work.concurrency, ask, on_answer)

    def _step_through(
        self,
        prompts: Sequence[Sequence[int]],
        work: Work,
        sampling: Any,
        on_answer: Callable[[], Any],
    ) -> list[Answer]:
        waiting = deque(prompts)
        order: list[str] = []
        records: dict[str, _Record] = {}
        running = 0
        while waiting or running:
            while waiting and running < work.concurrency:
                order.append(self._new_id())
                records[order[-1]] = _Record()
                prompt = {"prompt_token_ids": list(waiting.popleft())}
                self.engine.add_request(order[-1], prompt, sampling)
                running += 1
            for output in self.engine.step():
                records[output.request_id].add(output)
                if output.finished:
                    running -= 1
                    on_answer()
        return [records[name].answer(self.by_token) for name in order]

    def _new_id(self) -> str:
        self.count += 1
        return f"bench-{self.count}"

    def start_counting(self) -> None:
        """Count from now on; see `Counting.start_counting`."""
        if self.step_times:
            self._rpc("dlm_clock_start")

    def counts(self) -> Counts | None:
        """The first worker's; None without `step_times`.

        The workers of a tensor-parallel group do the same steps.
        """
        return Counts(**self._rpc("dlm_clock_read")[0]) if self.step_times else None

    def start_costing(self) -> None:
        """See `Costing.start_costing`."""
        self._rpc("dlm_costs_start")

    def costs(self) -> Costs:
        """The first worker's; see `Costing.costs`."""
        return Costs(**self._rpc("dlm_costs_read")[0])

    def _rpc(self, method: str) -> list[Any]:
        answer = self.engine.collective_rpc(method)
        if self.mode == "serve":
            answer = self.loop.run_until_complete(answer)
        return list(answer)

    def stop(self) -> None:
        """End vLLM, and let go of the memory that this process has of it."""
        if self.mode == "offline":
            self.engine.engine_core.shutdown()
            del self.engine
            gc.collect()
            torch.cuda.empty_cache()
            return

        async def stop() -> None:
            self.engine.shutdown()

        self.loop.run_until_complete(stop())
        self.loop.close()


class NativeEngine(VllmEngine):
    """DiffusionGemma by vLLM's own code, which takes no options of ours."""

    has_options = False

    def _own_arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        # Prompts here are text: nothing is to be kept for images.
        text_alone = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
        return text_alone | _cache_size(options)


class AutoregressiveEngine(VllmEngine):
    """vLLM with an ordinary model: neither strategy nor cache policy."""

    by_token = True
    has_options = False

    def _own_arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return _cache_size(options)


def _cache_size(options: Mapping[str, Any]) -> dict[str, Any]:
    """On a CPU a KV cache as large as our engine's: vLLM's default takes and clears
    most of the memory."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    pages = -(-options["max_length"] // CPU_PAGE)
    tokens = (options["max_concurrency"] * pages + 1) * CPU_PAGE
    return {"kv_cache_memory_bytes": tokens * options["token_bytes"]}
