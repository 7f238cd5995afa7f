# SPDX-License-Identifier: Apache-2.0
"""What the benchmark asks of an engine, ours or anybody's, and adapters for others.

An adapter is a class in a file of the user's: `--against adapter:FILE.py:Class`. It is
made without arguments and has the methods of `Engine`. benchmarks/openai_endpoint.py
is one, for any server that speaks OpenAI's HTTP API.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vllm_dlm.files.python_files import callables_in, load_file


class Unsupported(ValueError):
    """An engine cannot do what a cell asks; the cell is recorded with the reason."""


UNKNOWN_TOKEN = -1


@dataclass(frozen=True)
class Work:
    """How the prompts of a cell are to be answered."""

    max_tokens: int
    concurrency: int
    """Requests in flight: one that ends makes room for the next."""
    ignore_eos: bool
    """Write all of `max_tokens`, whatever the tokens are."""
    temperature: float = 0.0
    """Of the requests; 0 is greedy."""
    strategy: str = ""
    """Decoding strategy; empty for an engine that is not asked for one."""
    strategy_config: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "none"
    cache_config: Mapping[str, Any] = field(default_factory=dict)
    block_length: int | None = None
    steps: int | None = None
    """Denoise steps over the whole canvas; None is one token per step. For strategies
    that follow a schedule: `scheduled_steps`."""

    @property
    def scheduled_steps(self) -> int | None:
        """`steps` if the strategy follows a schedule: else a request has none."""
        from vllm_dlm.strategies import STRATEGIES

        if self.steps is None or self.strategy not in STRATEGIES:
            return None
        rule = STRATEGIES[self.strategy]
        follows = rule.follows_schedule(rule.Params(**self.strategy_config))
        return self.steps if follows else None


@dataclass(frozen=True)
class Answer:
    """One request's tokens and when they came; seconds since it was sent."""

    tokens: list[int]
    """Ids; `UNKNOWN_TOKEN` in all places where an engine says only how many."""
    first: float
    """Seconds until the first tokens."""
    first_tokens: int
    """How many tokens came first, together."""
    last: float
    """Seconds until the last token."""
    forwards: int | None = None
    """Model forwards it took part in, where the engine says."""

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first ones; None if there were none."""
        later = len(self.tokens) - self.first_tokens
        return (self.last - self.first) / later if later else None


class Engine(Protocol):
    """An engine under test."""

    def start(self, model: str, options: Mapping[str, Any]) -> None:
        """Load the model.

        Args:
            model: folder, hub id or alias.
            options: `dtype` ("float32" or "bfloat16"), `threads`, `max_concurrency`
                and `max_length` (tokens, prompt included) of any cell to come, `seed`,
                `ends_texts` (whether a token may end a text before `max_tokens`), and
                what `--adapter-option NAME=TEXT` adds.
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], work: Work, on_answer: Callable[[], Any]
    ) -> list[Answer]:
        """Answer all prompts (token ids), `work.concurrency` at a time.

        Args:
            on_answer: to be called after each answer, for the progress bar.

        Raises:
            Unsupported: the engine cannot work like that.
        """

    def stop(self) -> None:
        """End the engine and its processes."""


@dataclass(frozen=True)
class Counts:
    """What the workers of an engine did between two calls of `Counting`."""

    forwards: int
    """Forwards of the model, however many requests share one."""
    rows: int
    """Rows through the layers."""
    head_rows: int
    """Rows through lm_head."""
    pairs: int | None = None
    """Keys attended to, summed over rows; None where nobody counts."""
    forward_seconds: float | None = None
    head_seconds: float | None = None
    sampler_seconds: float | None = None
    """Time in the sampler, lm_head not included."""
    step_seconds: float | None = None
    """Time from the first forward's start to the last step's end."""
    forward_cpu: float | None = None
    """CPU seconds of the worker's process, all threads; as above."""
    head_cpu: float | None = None
    sampler_cpu: float | None = None
    step_cpu: float | None = None


@dataclass(frozen=True)
class Costs:
    """What the steps of an engine cost beside time; see `step_costs`."""

    steps: int
    launches: int
    """Of all these steps, the network left out."""
    sampling_bytes: int
    """Most bytes allocated at a time from a step's hidden states to its tokens."""
    state_bytes: int
    """Bytes that the engine holds for its requests, KV cache left out."""


@runtime_checkable
class Costing(Engine, Protocol):
    """An engine that says what its steps cost, which makes them slower."""

    def start_costing(self) -> None:
        """Count from here on."""

    def costs(self) -> Costs:
        """What the steps since then cost; counting ends."""


@runtime_checkable
class Counting(Protocol):
    """An engine that counts its work as well."""

    def start_counting(self) -> None:
        """Count from 0 from here on."""

    def counts(self) -> Counts | None:
        """What has been done since; None if nobody counted after all."""


def load_adapter(spec: str) -> type[Engine]:
    """The class of `FILE.py:Class`.

    Raises:
        ValueError: no such file or class, or one without an engine's methods.
    """
    path, _, name = spec.rpartition(":")
    if not path or not name:
        raise ValueError(f"adapter {spec!r}: expected FILE.py:Class")
    module = load_file(Path(path), f"adapter {spec!r}")
    adapter = getattr(module, name, None)
    if not isinstance(adapter, type):
        own = ((known, getattr(module, known)) for known in callables_in(module))
        classes = sorted(known for known, value in own if isinstance(value, type))
        raise ValueError(
            f"adapter {spec!r}: {path} has no class {name}; it has "
            f"{', '.join(classes) or 'none'}"
        )
    missing = [m for m in ("start", "generate", "stop") if not hasattr(adapter, m)]
    if missing:
        raise ValueError(f"adapter {spec!r}: {name} lacks {', '.join(missing)}")
    return adapter


async def closed_loop(
    prompts: Sequence[Sequence[int]],
    concurrency: int,
    ask: Callable[[Sequence[int]], Awaitable[Answer]],
    on_answer: Callable[[], Any],
) -> list[Answer]:
    """Answers to prompts, in their order; one that ends makes room for the next.

    Args:
        concurrency: how many are asked at a time.
        ask: answers one.
        on_answer: called after each.
    """
    waiting = deque(enumerate(prompts))
    answers: dict[int, Answer] = {}

    async def client() -> None:
        while waiting:
            index, prompt = waiting.popleft()
            answers[index] = await ask(prompt)
            on_answer()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [answers[index] for index in range(len(prompts))]
