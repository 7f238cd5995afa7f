# SPDX-License-Identifier: Apache-2.0
"""Two asynchronous engines that look like one to vLLM's HTTP server.

`PairClient` is an `EngineClient`: the server's handlers, and so its protocol,
streaming, templates, parsers and errors, are vLLM's own. A request becomes turns of
either engine (`text.py`); a client that leaves ends the turn that is under way.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.renderers.inputs.preprocess import extract_prompt_components
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_dlm.switching.entropy import LARGE, Model, SwitchRule
from vllm_dlm.switching.metrics import count_text
from vllm_dlm.switching.pair import Pair
from vllm_dlm.switching.sampling import check_sampling
from vllm_dlm.switching.text import Text, TextRequest


class PairClient(EngineClient):
    """See the module docstring.

    Args:
        engines: of both models.
        pair: what they were started with.
        rule: of requests that do not bring their own.
    """

    def __init__(
        self, engines: Mapping[Model, AsyncLLM], pair: Pair, rule: SwitchRule
    ) -> None:
        self._engines = dict(engines)
        self._pair = pair
        self._rule = rule
        # Request id -> ids of the turns under way.
        self._turns: dict[str, set[str]] = defaultdict(set)
        large = engines[LARGE]
        self.vllm_config = large.vllm_config
        self.model_config = large.model_config
        self.renderer = large.renderer
        self.input_processor = large.input_processor

    # -- requests ----------------------------------------------------------

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        prompt_text: str | None = None,
        lora_request: Any = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Check a request now, and write its texts as the result is read.

        Other options of `AsyncLLM.generate` are for grammars and tracing, which have no
        meaning here.

        Raises:
            VLLMValidationError: parameters that are not valid, or not supported.
        """
        if lora_request is not None:
            raise VLLMValidationError("an adapter fits one of the two models only")
        if data_parallel_rank is not None:
            raise VLLMValidationError(
                "X-data-parallel-rank names a rank of one engine; a pair has two"
            )
        rule = self.check_sampling(sampling_params)
        text, token_ids, embeds = extract_prompt_components(self.model_config, prompt)
        if not token_ids or embeds is not None or prompt.get("type") != "token":
            raise VLLMValidationError("two models share text only, as tokens")
        request = TextRequest(
            request_id=request_id,
            prompt=prompt_text or text,
            prompt_token_ids=token_ids,
            params=sampling_params,
            rule=rule,
            stop_token_id=self._pair.stop_token_id,
            max_model_len=self._pair.max_model_len,
            tokenizer=self.renderer.tokenizer,
            cache_salt=prompt.get("cache_salt"),
        )
        return self._answer(request, priority)

    def check_sampling(self, params: SamplingParams) -> SwitchRule:
        """Check a request's parameters; returns the rule that it asks for.

        Raises:
            VLLMValidationError: something is not supported or not valid (HTTP 400).
        """
        rule = check_sampling(params, self._rule, self._pair.stop_token_id)
        for engine in self._engines.values():
            params.verify(engine.model_config, None, None, None)
        return rule

    async def _answer(
        self, request: TextRequest, priority: int
    ) -> AsyncGenerator[RequestOutput, None]:
        texts = [Text(request, index) for index in range(request.params.n)]
        kind = request.params.output_kind
        writers = merge_async_iterators(
            *(self._write(text, priority) for text in texts)
        )
        try:
            async for index, _ in writers:
                if kind != RequestOutputKind.FINAL_ONLY and texts[index].has_news:
                    finished = all(text.finished for text in texts)
                    output = texts[index].output(kind)
                    yield request.output([output], texts[0].first, finished)
        finally:
            await writers.aclose()
            self._turns.pop(request.request_id, None)
            for text in texts:
                count_text(text)
        if kind == RequestOutputKind.FINAL_ONLY:
            outputs = [text.output(kind) for text in texts]
            yield request.output(outputs, texts[0].first, finished=True)

    async def _write(self, text: Text, priority: int) -> AsyncGenerator[None, None]:
        """Yields whenever there is something new."""
        request_id = text.request.request_id
        number = 0
        while not text.finished:
            turn_id = f"{request_id}-{text.index}-{number}"
            number += 1
            prompt, params = text.next_turn()
            turn = self._engines[text.model].generate(
                prompt, params, turn_id, priority=priority
            )
            self._turns[request_id].add(turn_id)
            try:
                async for output in turn:
                    is_over = text.add(output)
                    yield
                    if is_over:
                        break
            finally:
                # Where the engine is still at it, this ends its request.
                await turn.aclose()
                self._turns[request_id].discard(turn_id)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their readers get what there is, with reason "abort"."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        turns = [turn for each in ids for turn in self._turns.get(each, ())]
        await self._both(lambda engine: engine.abort(turns))

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Raise if one of the engines has too many requests."""
        for engine in self._engines.values():
            engine.check_admission(n, request_id)

    async def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to pool: both models write text."""
        raise NotImplementedError("a pair of models writes text; it does not pool")

    async def add_lora(self, lora_request: Any) -> bool:
        """Refuse an adapter, which would fit one of the two models only."""
        raise NotImplementedError("an adapter fits one of the two models only")

    async def notify_kv_transfer_request_rejected(
        self, *args: Any, **kwargs: Any
    ) -> None:
        """Refuse KV transfer: a text would have to be transferred to both engines."""
        raise NotImplementedError("KV transfer is not supported for a pair of models")

    async def get_supported_tasks(self) -> tuple[Any, ...]:
        """Writing text only."""
        return ("generate",)

    # -- state -------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Whether both engines are."""
        return all(engine.is_running for engine in self._engines.values())

    @property
    def is_stopped(self) -> bool:
        """Whether an engine is."""
        return any(engine.is_stopped for engine in self._engines.values())

    @property
    def errored(self) -> bool:
        """Whether an engine has failed."""
        return any(engine.errored for engine in self._engines.values())

    @property
    def dead_error(self) -> BaseException:
        """What to raise then."""
        return self._engines[LARGE].dead_error

    async def check_health(self) -> None:
        """Raise if an engine has failed."""
        await self._both(lambda engine: engine.check_health())

    async def is_tracing_enabled(self) -> bool:
        """Turns are not traced as one request."""
        return False

    async def is_sleeping(self) -> bool:
        """Whether an engine sleeps."""
        return any(await self._both(lambda engine: engine.is_sleeping()))

    async def is_paused(self) -> bool:
        """Whether an engine is paused."""
        return any(await self._both(lambda engine: engine.is_paused()))

    # -- what is done to both engines --------------------------------------

    async def _both(self, do: Callable[[AsyncLLM], Awaitable[Any]]) -> list[Any]:
        return await asyncio.gather(*map(do, self._engines.values()))

    async def do_log_stats(self) -> None:
        """Log both engines' statistics."""
        await self._both(lambda engine: engine.do_log_stats())

    async def start_profile(
        self, profile_prefix: str | None = None, **options: Any
    ) -> None:
        """Start both profilers."""
        await self._both(lambda engine: engine.start_profile(profile_prefix, **options))

    async def stop_profile(self) -> None:
        """Stop both profilers."""
        await self._both(lambda engine: engine.stop_profile())

    async def reset_mm_cache(self) -> None:
        """Reset both."""
        await self._both(lambda engine: engine.reset_mm_cache())

    async def reset_encoder_cache(self) -> None:
        """Reset both."""
        await self._both(lambda engine: engine.reset_encoder_cache())

    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Reset both; whether both could be."""
        options = (reset_running_requests, reset_connector)
        return all(await self._both(lambda each: each.reset_prefix_cache(*options)))

    async def sleep(self, level: int = 1, mode: Any = "abort") -> None:
        """Put both to sleep.

        Raises:
            ValueError: what two engines cannot do together.
        """
        if mode == "wait":
            raise ValueError(
                "mode 'wait': a text's next turn would wait for an engine that sleeps "
                "already; use 'abort' or 'keep'"
            )
        if level > 1:
            raise ValueError(
                "level 2 drops the weights, and a pair cannot load them again; use 0 "
                "or 1"
            )
        await self._both(lambda engine: engine.sleep(level, mode))

    async def wake_up(self, tags: list[str] | None = None) -> Any:
        """Wake both; whether both are fully awake."""
        return all(await self._both(lambda engine: engine.wake_up(tags)))

    async def release_kv_cache_memory(self) -> None:
        """Release both."""
        await self._both(lambda engine: engine.release_kv_cache_memory())

    async def pause_generation(self, **options: Any) -> None:
        """Pause both."""
        await self._both(lambda engine: engine.pause_generation(**options))

    async def resume_generation(self) -> None:
        """Let both go on."""
        await self._both(lambda engine: engine.resume_generation())

    def shutdown(self, timeout: float | None = None) -> None:
        """Stop both."""
        for engine in self._engines.values():
            engine.shutdown(timeout=timeout)
