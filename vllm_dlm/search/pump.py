# SPDX-License-Identifier: Apache-2.0
"""The pump: it runs the searches of all prompts in one engine and one scorer.

It gathers what the searches want, asks the engine for all of it at once, and hands the
answers back as they come: a slow prompt holds nobody up. The scorer is called when the
engine has nothing more to do, with all texts that wait.
"""

from __future__ import annotations

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_dlm.search.base import (
    NOTHING,
    Branch,
    Budget,
    Candidate,
    Complete,
    Extend,
    Piece,
    Request,
    Result,
    Score,
    Scorer,
    Search,
    Stats,
    Task,
    Text,
)
from vllm_dlm.search.checks import checked_candidates, checked_scores
from vllm_dlm.search.jobs import Engine, Job, Plan, Reply, draw_seed

CACHED_REPLIES = 65536
"""Replies that are kept, for texts that are asked for again."""

OnResult = Callable[[int, Result], None]

Ask = tuple[int, Job]
"""The number of an engine, and what it is asked."""


@dataclass
class _Run:
    """The search of one prompt."""

    task: Task
    search: Search
    stats: Stats = field(default_factory=Stats)
    request: Request | None = None
    asks: list[Ask | None] = field(default_factory=list)
    """Of the request; None for a piece that nobody need be asked for."""
    replies: dict[int, Reply] = field(default_factory=dict)
    """Place in `asks` -> what came back."""
    missing: int = 0
    is_first: bool = True
    best: tuple[Text, float | None] | None = None
    """The text, and its score, that is returned if the budget ends the search."""
    found: list[Candidate] | None = None


class Pump:
    """See the module docstring.

    Args:
        engines: that the searches may name; the first is theirs.
        scorers: the same of scorers.
        budget: of each search.
        seed: of draws.
        on_result: is called with a prompt's number and its result, when it is there.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        scorers: Sequence[Scorer],
        budget: Budget,
        seed: int,
        on_result: OnResult,
    ) -> None:
        self._engines = engines
        self._scorers = scorers
        self._budget = budget
        self._seed = seed
        self._on_result = on_result
        self._begun = time.monotonic()
        self._waiting: dict[Ask, list[tuple[_Run, int]]] = {}
        self._known: OrderedDict[Ask, Reply] = OrderedDict()
        self._to_score: list[_Run] = []

    def run(self, tasks: Sequence[Task], searches: Sequence[Search]) -> list[Result]:
        """Run all searches to their ends.

        Returns:
            What each of them found, in their order.
        """
        runs = [_Run(*each) for each in zip(tasks, searches, strict=True)]
        try:
            for run in runs:
                self._go_on(run, None)
            while self._waiting or self._to_score:
                if self._waiting:
                    self._poll()
                else:
                    self._score()
                self._end_late(runs)
        finally:
            for run in runs:
                run.search.close()
            for number, engine in enumerate(self._engines):
                engine.cancel([job for at, job in self._waiting if at == number])
        return [Result(run.found or [], run.stats) for run in runs]

    # -- a search goes on, and ends ------------------------------------------

    def _go_on(self, run: _Run, answer: Any) -> None:
        """Resume a search, until it wants something that takes time."""
        while True:
            try:
                request = run.search.send(answer)
            except StopIteration as end:
                self._end(run, checked_candidates(end.value, run.task))
                return
            run.request = request
            if self._begin(run, request):
                return
            if run.found is not None:
                return
            answer = self._answer(run)

    def _begin(self, run: _Run, request: Request) -> bool:
        """Ask for what a request wants; whether there is anything to wait for."""
        if isinstance(request, Score):
            needs = {"scores": len(request.texts)}
            if not self._affords(run, needs):
                return False
            if not request.texts:
                return False
            if request.scorer >= len(self._scorers):
                raise ValueError(f"this search has no scorer {request.scorer}")
            self._to_score.append(run)
            return True
        run.asks = list(self._asks(run.task, request))
        run.replies = {}
        fresh = []
        for ask in dict.fromkeys(run.asks):
            if ask is not None and ask not in self._known and ask not in self._waiting:
                fresh.append(ask)
        needs = {
            "requests": len(fresh),
            "tokens": sum(job.keep or job.max_tokens for _, job in fresh),
        }
        if not self._affords(run, needs):
            return False
        run.missing = 0
        for place, ask in enumerate(run.asks):
            if ask is None:
                continue
            if ask in self._known:
                run.replies[place] = self._known[ask]
                continue
            run.missing += 1
            if ask not in self._waiting:
                self._submit(run, ask)
            self._waiting[ask].append((run, place))
        return run.missing > 0

    def _submit(self, run: _Run, ask: Ask) -> None:
        number, job = ask
        try:
            self._engines[number].submit(job)
        except ValueError as error:
            raise ValueError(f"prompt {run.task.index}: {error}") from error
        self._waiting[ask] = []
        run.stats.requests += 1

    def _affords(self, run: _Run, needs: Mapping[str, int]) -> bool:
        """Whether the budget allows for something; if not, the search has ended.

        Raises:
            ValueError: not even the first request.
        """
        used = {
            "tokens": run.stats.generated,
            "requests": run.stats.requests,
            "scores": run.stats.scores,
        }
        for what, need in needs.items():
            limit = getattr(self._budget, what)
            if limit is None or used[what] + need <= limit:
                continue
            if run.is_first:
                raise ValueError(
                    f"a budget of {limit} {what} is too small: the first request of "
                    f"this search needs {need}; raise it to that at least, or lower "
                    "what the search asks for (n, max_tokens)"
                )
            self._exhaust(run, what)
            return False
        run.is_first = False
        return True

    def _exhaust(self, run: _Run, what: str) -> None:
        run.search.close()
        run.stats.exhausted = what
        text, score = run.best or (run.task.start, None)
        self._end(run, [run.task.candidate(text, score)])

    def _end(self, run: _Run, found: list[Candidate]) -> None:
        run.found = found
        run.stats.seconds = time.monotonic() - self._begun
        self._on_result(run.task.index, Result(found, run.stats))

    def _end_late(self, runs: Iterable[_Run]) -> None:
        """End the searches whose time is over."""
        limit = self._budget.seconds
        if limit is None or time.monotonic() - self._begun < limit:
            return
        for run in runs:
            if run.found is None:
                self._exhaust(run, "seconds")
        self._to_score.clear()
        for number, engine in enumerate(self._engines):
            engine.cancel([job for at, job in self._waiting if at == number])
        self._waiting.clear()

    # -- engines --------------------------------------------------------------

    def _asks(
        self, task: Task, request: Complete | Extend | Branch
    ) -> Iterable[Ask | None]:
        """What a request asks of which engine, text by text and sample by sample."""
        if isinstance(request, Branch):
            engine = self._engines[0]
            if engine.kind != "autoregressive":
                raise ValueError(
                    "a diffusion model has no next token: this search needs an "
                    "autoregressive model"
                )
            if engine.most_top is not None and request.k > engine.most_top:
                raise ValueError(
                    f"the search looks at {request.k} next tokens, and the engine "
                    f"tells {engine.most_top}: start it with max_logprobs={request.k}, "
                    "or let the search look at fewer"
                )
            for text in request.texts:
                yield 0, Job(text, max_tokens=1, top=request.k)
            return
        if request.engine >= len(self._engines):
            raise ValueError(f"this search has no engine {request.engine}")
        pace = self._engines[request.engine].pace
        for place, text in enumerate(request.texts):
            room = request.max_tokens - len(text.written)
            if text.finished or room < 1:
                yield from [None] * request.n
                continue
            if isinstance(request, Complete):
                plan = Plan(room, options=request.options)
            else:
                plan = pace.plan(text, request.until, request.max_tokens)
            first = request.first
            first = first if isinstance(first, int) else first[place]
            for number in range(first, first + request.n):
                is_draw = request.temperature > 0
                yield (
                    request.engine,
                    Job(
                        text,
                        plan.max_tokens,
                        temperature=request.temperature,
                        seed=draw_seed(self._seed, task.index, text, number)
                        if is_draw
                        else None,
                        keep=plan.keep,
                        stop=plan.stop,
                        options=_frozen(plan.options or {}),
                    ),
                )

    def _poll(self) -> None:
        for number, engine in enumerate(self._engines):
            if not any(at == number for at, _ in self._waiting):
                continue
            for job, reply in engine.poll():
                ask = (number, job)
                waiters = self._waiting.pop(ask, None)
                if waiters is None:
                    continue
                self._remember(ask, reply)
                # Whoever asked first has it on the bill.
                stats = waiters[0][0].stats
                stats.generated += reply.generated
                stats.prompt_tokens += reply.prompt_tokens
                stats.cached_tokens += reply.cached_tokens
                for run, place in waiters:
                    run.replies[place] = reply
                    run.missing -= 1
                ready = {id(run): run for run, _ in waiters if run.missing == 0}
                for run in ready.values():
                    self._go_on(run, self._answer(run))

    def _remember(self, ask: Ask, reply: Reply) -> None:
        self._known[ask] = reply
        if len(self._known) > CACHED_REPLIES:
            self._known.popitem(last=False)

    def _answer(self, run: _Run) -> Any:
        """The answer to a request all of whose replies are there."""
        request = run.request
        if isinstance(request, Score):
            return []
        assert request is not None
        if isinstance(request, Branch):
            return [list(run.replies[i].top) for i in range(len(request.texts))]
        answer: list[list[Piece]] = []
        for i, text in enumerate(request.texts):
            places = range(i * request.n, (i + 1) * request.n)
            pieces = [self._piece(run, request, text, place) for place in places]
            answer.append(pieces)
            if isinstance(request, Complete):
                for piece in pieces:
                    self._note(run, run.task.add(text, piece), None)
        return answer

    def _piece(
        self, run: _Run, request: Complete | Extend, text: Text, place: int
    ) -> Piece:
        """What a reply has written, and whether the text ends with it."""
        ask = run.asks[place]
        if ask is None:
            return NOTHING
        job, reply = ask[1], run.replies[place]
        tokens = reply.tokens[: job.keep]
        logprobs = reply.logprobs[: job.keep]
        stop = reply.stop if reply.stop in run.task.stops else None
        is_cut = len(tokens) < len(reply.tokens)
        is_step_end = reply.stop is not None and stop is None
        if reply.finish_reason == "stop" and not is_cut and not is_step_end:
            return Piece(tokens, logprobs, True, "stop", stop)
        is_full = len(text.written) + len(tokens) >= request.max_tokens
        # Fewer than were asked for: the context is full.
        is_full |= reply.finish_reason == "length" and len(tokens) < min(
            job.max_tokens, job.keep or job.max_tokens
        )
        if is_full or isinstance(request, Complete) or not tokens:
            return Piece(tokens, logprobs, True, "length")
        return Piece(tokens, logprobs, False)

    # -- scorers --------------------------------------------------------------

    def _score(self) -> None:
        """Call the scorers with everything that waits."""
        runs, self._to_score = self._to_score, []
        runs.sort(key=lambda run: run.task.index)
        waiting: dict[int, list[tuple[_Run, list[Candidate]]]] = {}
        for run in runs:
            request = run.request
            assert isinstance(request, Score)
            batch = [run.task.candidate(text) for text in request.texts]
            waiting.setdefault(request.scorer, []).append((run, batch))
        for number, batches in waiting.items():
            everything = [one for _, batch in batches for one in batch]
            scores = checked_scores(self._scorers[number](everything), everything)
            start = 0
            for run, batch in batches:
                own = scores[start : start + len(batch)]
                start += len(batch)
                run.stats.scores += len(batch)
                for candidate, score in zip(batch, own, strict=True):
                    if number == 0:
                        self._note(run, candidate.state, score)
                self._go_on(run, own)

    def _note(self, run: _Run, text: Text, score: float | None) -> None:
        """Keep the best so far."""
        if run.best is None or _standing(text, score) > _standing(*run.best):
            run.best = text, score


def _standing(text: Text, score: float | None) -> tuple[bool, bool, float, float]:
    """What is compared where a search is cut short."""
    return (
        text.finished,
        score is not None,
        -math.inf if score is None else score,
        text.mean_logprob,
    )


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, json.dumps(value)) for name, value in options.items()))
