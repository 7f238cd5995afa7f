# SPDX-License-Identifier: Apache-2.0
"""An engine of a search that reads a table of probabilities instead of a model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vllm_dlm import search
from vllm_dlm.search.adapter import TokenPace
from vllm_dlm.search.base import Kind, Text, Token
from vllm_dlm.search.jobs import Job, Reply

END = 0
LETTERS = "$abcdefghijklmnopqrstuvwxyz.?"
"""Token i is letter i; 0 ends a text, and is written as nothing."""

Table = Callable[[tuple[Token, ...]], Mapping[int, float]]


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(LETTERS.index, text))


def letters(tokens: Iterable[Token]) -> str:
    return "".join(LETTERS[int(token)] for token in tokens if token != END)


def table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """From what is written, whatever the prompt, to letters; what is not there ends."""
    known = {
        ids(before): {LETTERS.index(letter): p for letter, p in row.items()}
        for before, row in rows.items()
    }
    return lambda written: known.get(written, {END: 1.0})


class TableModel:
    """See `Engine`: an autoregressive model whose probabilities are a table.

    Args:
        probabilities: of the next token, given what is written behind the prompt.
        burst: jobs that are done in one poll; the last begun come first.
    """

    kind: Kind = "autoregressive"
    ends: frozenset[Token] = frozenset({END})
    stops: tuple[str, ...] = ()

    def __init__(
        self, probabilities: Table, burst: int = 1000, most_top: int | None = 20
    ) -> None:
        self.probabilities = probabilities
        self.burst = burst
        self.most_top = most_top
        self.pace = TokenPace()
        self.asked: list[Job] = []
        self.waiting: list[Job] = []
        self.closed = 0

    def encode(self, prompt: Any) -> tuple[Token, ...]:
        return ids(prompt)

    def encode_text(self, text: str) -> tuple[Token, ...]:
        return ids(text)

    def decode(self, text: Text) -> str:
        return letters(text.written)

    def vocabulary(self) -> Mapping[str, int]:
        return {letter: i for i, letter in enumerate(LETTERS)}

    def check_options(self, options: Mapping[str, Any]) -> None:
        pass

    def submit(self, job: Job) -> None:
        self.asked.append(job)
        self.waiting.append(job)

    def poll(self) -> list[tuple[Job, Reply]]:
        done = [self.waiting.pop() for _ in range(min(self.burst, len(self.waiting)))]
        return [(job, self.reply(job)) for job in done]

    def cancel(self, jobs: Iterable[Job]) -> None:
        unwanted = set(jobs)
        self.waiting = [job for job in self.waiting if job not in unwanted]

    def close(self) -> None:
        self.closed += 1

    def reply(self, job: Job) -> Reply:
        draws = random.Random(job.seed)
        written = job.text.written
        new: list[int] = []
        logprobs: list[float] = []
        reason, stop = "length", None
        first = sorted(
            self.probabilities(written).items(), key=lambda one: one[1], reverse=True
        )
        while len(new) < job.max_tokens:
            row = self.probabilities((*written, *new))
            if job.temperature:
                weights = [p ** (1 / job.temperature) for p in row.values()]
                (token,) = draws.choices(list(row), weights)
            else:
                token = max(row, key=row.__getitem__)
            new.append(token)
            logprobs.append(math.log(row[token]))
            if token in self.ends:
                reason = "stop"
                break
            found = [s for s in (*self.stops, *job.stop) if s in letters(new)]
            if found:
                reason, stop = "stop", found[0]
                break
        return Reply(
            tuple(new),
            tuple(logprobs),
            reason,
            stop,
            tuple((token, math.log(p)) for token, p in first[: job.top]),
            prompt_tokens=len(job.text.prompt) + len(written),
            generated=len(new),
        )


def run(model: TableModel, driver: Any, prompts: Any = "?", **options: Any) -> Any:
    return search.run(model, driver, prompts, use_tqdm=False, **options)


def one(*args: Any, **options: Any) -> Any:
    (result,) = run(*args, **options)
    return result


def by_text(scores: dict[str, float], default: float = 0.0) -> Any:
    return lambda candidates: [scores.get(one.text, default) for one in candidates]


def constant(score: float) -> Any:
    return lambda candidates: [score for _ in candidates]
