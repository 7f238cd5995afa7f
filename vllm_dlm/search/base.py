# SPDX-License-Identifier: Apache-2.0
"""What a search is made of: texts, what may be asked about them, and what comes back.

A search is a generator. It yields a request (`Complete`, `Extend`, `Branch`, `Score`)
and is resumed with the answer; it knows no engine and no other prompt, and is tested
against a table of probabilities. `pump.py` runs the searches of all prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Token: TypeAlias = int | str
"""A token's id, or its text where an endpoint tells nothing else."""

Kind: TypeAlias = Literal["autoregressive", "full", "block", "causal", "diffusion"]
"""How a model writes: token by token, or blocks with such an attention. "diffusion" is
an endpoint's model of which no more is known."""


@dataclass(frozen=True)
class Text:
    """A prompt and what is written behind it; equal to a text of the same tokens."""

    prompt: tuple[Token, ...]
    written: tuple[Token, ...] = ()
    logprob: float = field(default=0.0, compare=False)
    """Sum of the written tokens' log-probabilities (of a diffusion model: in the step
    that wrote each)."""
    finished: bool = field(default=False, compare=False)
    finish_reason: str | None = field(default=None, compare=False)
    """"stop" or "length", once it is finished."""
    stop: str | None = field(default=None, compare=False)
    """The stop string that ended it, which `Task.decode` cuts off."""

    @property
    def mean_logprob(self) -> float:
        """`logprob` for each written token; 0 where nothing is written."""
        return self.logprob / len(self.written) if self.written else 0.0


@dataclass(frozen=True)
class Piece:
    """What one request of an engine has written behind a text."""

    tokens: tuple[Token, ...]
    logprobs: tuple[float, ...]
    """Of each token."""
    finished: bool
    """The text ends with it: an end-of-text token or a stop string, or no room."""
    finish_reason: str | None = None
    stop: str | None = None


NOTHING = Piece((), (), True, "length")
"""Behind a text that has no room."""


# -- what a search may yield ----------------------------------------------------


@dataclass(frozen=True)
class Step:
    """How far `Extend` goes: to a stop string, some tokens, or whole blocks.

    Args:
        stop: strings that end a step, which they are part of.
        tokens: most tokens of a step.
        blocks: of a diffusion model, blocks of a step.
    """

    stop: tuple[str, ...] = ()
    tokens: int | None = None
    blocks: int | None = None


@dataclass(frozen=True)
class Complete:
    """Write texts to their ends. The answer: for each text its `n` pieces.

    Args:
        texts: what is continued.
        max_tokens: most tokens of a whole written text, with what it has already.
        n: samples of each text.
        temperature: 0 for the likeliest token.
        first: number of the first sample: another number is another draw. One for all
            texts, or one for each.
        options: `dlm` options of these requests, of a diffusion model.
        engine: which of the search's engines writes.
    """

    texts: Sequence[Text]
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    first: int | Sequence[int] = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: int = 0


@dataclass(frozen=True)
class Extend:
    """Write one step behind texts. The answer: for each text its `n` pieces.

    Args:
        texts, max_tokens, n, temperature, first, engine: as of `Complete`.
        until: how far.
    """

    texts: Sequence[Text]
    max_tokens: int
    until: Step
    n: int = 1
    temperature: float = 0.0
    first: int | Sequence[int] = 0
    engine: int = 0


@dataclass(frozen=True)
class Branch:
    """The `k` likeliest next tokens of an autoregressive model's texts.

    The answer: for each text a list of tokens and their log-probabilities, the
    likeliest first.
    """

    texts: Sequence[Text]
    k: int


@dataclass(frozen=True)
class Score:
    """What a scorer thinks of texts. The answer: a float for each, higher is better.

    Args:
        texts: finished or not.
        scorer: which of the search's scorers.
    """

    texts: Sequence[Text]
    scorer: int = 0


Request: TypeAlias = Complete | Extend | Branch | Score


# -- what comes back ------------------------------------------------------------


@dataclass
class Candidate:
    """A text as a scorer and the user see it."""

    prompt: Any
    """As it was given."""
    index: int
    """Of the prompt."""
    state: Text
    text: str
    score: float | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the driver has it from."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What else the prompt's dict holds, such as a reference answer."""

    @property
    def token_ids(self) -> tuple[Token, ...]:
        """The written tokens."""
        return self.state.written

    @property
    def finished(self) -> bool:
        """Whether the text has come to its end."""
        return self.state.finished


Scorer: TypeAlias = Callable[[list[Candidate]], Sequence[float]]
"""Anything that says how good texts are. It is called with all candidates that wait, of
all prompts at once."""

Search: TypeAlias = Generator[Request, Any, list[Candidate]]

Steps: TypeAlias = Generator[Request, Any, Any]
"""A part of a search, which returns what the rest goes on with."""


class Budget(BaseModel):
    """What the search of one prompt may use at most; None for any amount."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int | None = Field(default=None, gt=0, description="Most generated tokens.")
    requests: int | None = Field(
        default=None,
        gt=0,
        description="Most requests to an engine, one for each sample.",
    )
    scores: int | None = Field(default=None, gt=0, description="Most texts scored.")
    seconds: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Most seconds, of all searches together.",
    )


@dataclass
class Stats:
    """What the search of one prompt took."""

    generated: int = 0
    """Tokens that engines wrote for it, also those that were cut off."""
    requests: int = 0
    """Requests to an engine, one for each sample."""
    prompt_tokens: int = 0
    """Tokens that the requests began with."""
    cached_tokens: int = 0
    """Those of them that were found in the prefix cache."""
    scores: int = 0
    """Texts scored."""
    seconds: float = 0.0
    """Until the search ended; those of other prompts ran meanwhile."""
    exhausted: str | None = None
    """The budget that ended the search."""


@dataclass
class Result:
    """What the search of one prompt found."""

    candidates: list[Candidate]
    """The best first; only one where a budget ended the search."""
    stats: Stats

    @property
    def best(self) -> Candidate:
        """The first candidate."""
        return self.candidates[0]

    @property
    def exhausted(self) -> str | None:
        """The budget that ended the search: "tokens", "requests", ... or None."""
        return self.stats.exhausted


# -- what a driver is, and what it is given -------------------------------------


@dataclass(frozen=True)
class Task:
    """A prompt that is to be searched, and what a driver must know of its model."""

    prompt: Any
    index: int
    start: Text
    """The prompt with nothing written."""
    to_text: Callable[[Text], str]
    """The written tokens as text, stop strings included."""
    to_tokens: Callable[[str], tuple[Token, ...]] | None = None
    """A text's tokens, without special ones; None where nobody can tell."""
    ends: frozenset[Token] = frozenset()
    """Tokens that end a text."""
    stops: tuple[str, ...] = ()
    """Stop strings that end a text."""
    kind: Kind = "autoregressive"
    has_scorer: bool = True
    record: Mapping[str, Any] = field(default_factory=dict)

    def decode(self, text: Text) -> str:
        """The written text, without the stop string that ended it."""
        whole = self.to_text(text)
        if text.stop is not None and text.stop in whole:
            return whole[: whole.index(text.stop)]
        return whole

    def add(self, text: Text, piece: Piece) -> Text:
        """The text with a piece behind it."""
        longer = replace(
            text,
            written=text.written + piece.tokens,
            logprob=text.logprob + math.fsum(piece.logprobs),
            finished=piece.finished,
            finish_reason=piece.finish_reason if piece.finished else None,
            stop=piece.stop,
        )
        # A stop string may begin in an earlier piece, where the engine sees no part
        # of it.
        return longer if piece.finished or not text.written else self._stopped(longer)

    def write(self, text: Text, token: Token, logprob: float, max_tokens: int) -> Text:
        """The text with a token of `Branch` behind it."""
        reason = None
        if token in self.ends:
            reason = "stop"
        elif len(text.written) + 1 >= max_tokens:
            reason = "length"
        piece = Piece((token,), (logprob,), reason is not None, reason)
        longer = self.add(text, piece)
        return longer if reason == "stop" else self._stopped(longer)

    def _stopped(self, text: Text) -> Text:
        if not self.stops:
            return text
        whole = self.to_text(text)
        found = [stop for stop in self.stops if stop in whole]
        if not found:
            return text
        first = min(found, key=whole.index)
        return replace(text, finished=True, finish_reason="stop", stop=first)

    def candidate(
        self, text: Text, score: float | None = None, **origin: Any
    ) -> Candidate:
        """A candidate of this prompt."""
        return Candidate(
            self.prompt, self.index, text, self.decode(text), score, origin, self.record
        )


class Driver(BaseModel):
    """A way to search: its fields are its options.

    A third party subclasses it, and adds it through the entry-point group
    `vllm_dlm.searches`, or passes the class to `search.run`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    summary: ClassVar[str]
    """What it does, in a line."""
    paper: ClassVar[str] = ""
    scorer: ClassVar[Literal["needed", "optional", "unused"]] = "optional"
    """Whether it works with a scorer, and without."""
    branches: ClassVar[bool] = False
    """It looks at next tokens, which diffusion models do not have."""

    seed: int = Field(
        default=0, description="The same seed gives the same draws, whoever else asks."
    )

    def search(self, task: Task) -> Search:
        """The generator that searches for one prompt; it returns the best first."""
        raise NotImplementedError

    def scorers(self) -> Sequence[Scorer]:
        """Scorers besides that of `search.run`, numbered from 1."""
        return ()

    def engines(self) -> Sequence[Any]:
        """Engines besides that of `search.run`, numbered from 1."""
        return ()

    def check(self, kind: Kind, has_scorer: bool) -> None:
        """Refuse options that do not go with a model, or with a scorer.

        Raises:
            ValueError: what would work instead.
        """

    def request_options(self) -> Sequence[Mapping[str, Any]]:
        """`dlm` options that its requests will set, which are checked at the start."""
        return ()


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first: by score, then log-probability per token, then the earlier."""
    return sorted(candidates, key=rank, reverse=True)


def rank(candidate: Candidate) -> tuple[float, float]:
    """What candidates are compared by; one without a score is below any score."""
    score = -math.inf if candidate.score is None else candidate.score
    return score, candidate.state.mean_logprob
