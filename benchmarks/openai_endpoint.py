# SPDX-License-Identifier: Apache-2.0
"""An adapter of `vllm-dlm bench` for any server with OpenAI's completions over HTTP.

SGLang, LMDeploy, a stock vLLM, or ours:

    vllm-dlm bench --skip-ours --model random-60m --concurrency 1,16 \\
        --against adapter:benchmarks/openai_endpoint.py:OpenAIEndpoint \\
        --adapter-option url=http://localhost:8000/v1

The server must already serve the model, and take prompts as lists of token ids. The
options are `url` (required), `model` (its name there; default: the first that the
server lists) and `xargs=dlm` for a server of ours, which then gets each cell's strategy
and cache policy; any other decodes as it was started. Timings include HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from openai import AsyncOpenAI

from vllm_dlm.bench.engine import UNKNOWN_TOKEN, Answer, Work, closed_loop

HOURS = 3600.0


class OpenAIEndpoint:
    """A running server, as an engine of the benchmark."""

    def start(self, model: str, options: Mapping[str, Any]) -> None:
        """Find the server.

        Raises:
            ValueError: no `url` among the options, or an unknown `xargs`.
        """
        if "url" not in options:
            raise ValueError(
                "OpenAIEndpoint: --adapter-option url=http://HOST:PORT/v1 is needed"
            )
        if options.get("xargs", "dlm") != "dlm":
            raise ValueError("OpenAIEndpoint: xargs can only be dlm")
        self.asks_ours = "xargs" in options
        self.loop = asyncio.new_event_loop()
        # The client insists on some key; servers on one's own machine have none.
        self.client = AsyncOpenAI(
            base_url=options["url"],
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            timeout=HOURS,
            max_retries=0,
        )
        self.model = options.get("model") or self.loop.run_until_complete(self._first())

    async def _first(self) -> str:
        models = await self.client.models.list()
        return models.data[0].id

    def generate(
        self, prompts: Sequence[Sequence[int]], work: Work, on_answer: Callable[[], Any]
    ) -> list[Answer]:
        """Answer all prompts over HTTP, streamed."""

        def ask(prompt: Sequence[int]) -> Awaitable[Answer]:
            return self._one(prompt, work)

        return self.loop.run_until_complete(
            closed_loop(prompts, work.concurrency, ask, on_answer)
        )

    async def _one(self, prompt: Sequence[int], work: Work) -> Answer:
        sent = time.perf_counter()
        tokens: list[int] = []
        first = last = 0.0
        first_tokens = count = 0
        stream = await self.client.completions.create(
            model=self.model,
            prompt=list(prompt),
            max_tokens=work.max_tokens,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self._body(work),
        )
        async for chunk in stream:
            if chunk.usage is not None:
                count = chunk.usage.completion_tokens
            if not chunk.choices:
                continue
            new = (chunk.choices[0].model_extra or {}).get("token_ids") or []
            if new or chunk.choices[0].text:
                last = time.perf_counter() - sent
                if not first:
                    # Without ids, how many came first is unknown.
                    first, first_tokens = last, len(new) or 1
                tokens += new
        if not tokens and not count:
            raise ValueError(
                "OpenAIEndpoint: the server says neither token_ids nor usage, so "
                "nothing can be counted"
            )
        return Answer(tokens or [UNKNOWN_TOKEN] * count, first, first_tokens, last)

    def _body(self, work: Work) -> dict[str, Any]:
        # vLLM's names; servers that do not know one ignore it.
        body: dict[str, Any] = {
            "ignore_eos": work.ignore_eos,
            "return_token_ids": True,
        }
        if self.asks_ours:
            options = {
                "strategy": work.strategy,
                "strategy_config": json.dumps(dict(work.strategy_config)),
                "cache": work.cache,
                "cache_config": json.dumps(dict(work.cache_config)),
                "block_length": work.block_length,
                "steps": work.scheduled_steps,
            }
            body["vllm_xargs"] = {
                f"dlm_{name}": value
                for name, value in options.items()
                if value not in (None, "{}")
            }
        return body

    def stop(self) -> None:
        """Close the connections; the server goes on."""
        self.loop.run_until_complete(self.client.close())
        self.loop.close()
