# SPDX-License-Identifier: Apache-2.0
"""What the pump asks of an engine: one piece of one text each time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

from vllm_dlm.search.base import Kind, Step, Text, Token


@dataclass(frozen=True)
class Job:
    """One request of an engine. Equal jobs have equal replies."""

    text: Text
    """What is continued."""
    max_tokens: int
    """Most tokens that the engine writes."""
    temperature: float = 0.0
    seed: int | None = None
    """Of a draw; None without temperature."""
    keep: int | None = None
    """Tokens that are wanted: the engine may stop once it has them."""
    stop: tuple[str, ...] = ()
    """Strings that end the piece, besides those that end a text."""
    top: int = 0
    """Likeliest next tokens that are asked for."""
    options: tuple[tuple[str, str], ...] = ()
    """`dlm` options of the request: pairs of a name and a value as JSON."""


@dataclass(frozen=True)
class Reply:
    """What an engine says to a job."""

    tokens: tuple[Token, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    """"stop" or "length"; "kept" if the engine was stopped with enough tokens."""
    stop: str | None = None
    """The stop string that ended it."""
    top: tuple[tuple[Token, float], ...] = ()
    """The likeliest first tokens and their log-probabilities, the likeliest first."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    """Tokens that were written, with those that are not in the reply."""


@dataclass(frozen=True)
class Plan:
    """How an engine writes one step."""

    max_tokens: int
    keep: int | None = None
    stop: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    """`dlm` options that the step needs."""


class Pace(Protocol):
    """What a step is to a kind of model; see `adapter.py`."""

    def plan(self, text: Text, until: Step, max_tokens: int) -> Plan:
        """How to write one step.

        Args:
            text: what is continued; it has room.
            until: how far.
            max_tokens: most tokens of the whole written text.

        Raises:
            ValueError: the model cannot write such steps.
        """


class Engine(Protocol):
    """Whoever answers jobs: an engine in this process, an endpoint, a table."""

    kind: Kind
    pace: Pace
    ends: frozenset[Token]
    """Tokens that end a text."""
    stops: tuple[str, ...]
    """Strings that end a text."""
    most_top: int | None
    """Most next tokens that it tells; None for any number."""

    def encode(self, prompt: Any) -> tuple[Token, ...]:
        """A prompt's tokens, as the engine is asked with them.

        Args:
            prompt: a text, token ids, or messages of a chat.

        Raises:
            ValueError: it is none of these, or nothing for this engine.
        """

    def encode_text(self, text: str) -> tuple[Token, ...]:
        """A text's tokens, without special ones.

        Raises:
            ValueError: the engine does not tell.
        """

    def decode(self, text: Text) -> str:
        """The written tokens as text, without special tokens."""

    def vocabulary(self) -> Mapping[str, int] | None:
        """Tokens and ids; None if the engine does not tell."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse `dlm` options that a request of this engine cannot have.

        Raises:
            ValueError: what is wrong with them.
        """

    def submit(self, job: Job) -> None:
        """Begin a job.

        Raises:
            ValueError: the engine refuses it.
        """

    def poll(self) -> Iterable[tuple[Job, Reply]]:
        """Wait a while, and return what is done; of the jobs that were begun."""

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Stop jobs that nobody waits for any more."""

    def close(self) -> None:
        """The search is over: let go of what it needed; jobs are done or cancelled."""


def draw_seed(seed: int, index: int, text: Text, number: int) -> int:
    """The seed of a draw: of a search, a prompt, what is written, and a sample number.

    It depends on nothing else: neither on what else runs, nor on when.
    """
    name = repr((seed, index, text.prompt, text.written, number)).encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest()) >> 1
