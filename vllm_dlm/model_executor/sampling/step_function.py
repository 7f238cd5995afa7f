# SPDX-License-Identifier: Apache-2.0
"""StepFunction: what becomes of one group's blocks in a step, as one function.

    statistics of rows -> view -> strategy -> safety -> canvas -> next block, reply

A row's decision depends on no other row, so each group of requests (`groups.py`) has
the whole function to itself, and writes its own rows of the reply. Everything here is
tensors in, tensors out, without a look at their values: run as it stands it dispatches
some two hundred small operations, compiled by `torch.compile` it is a handful of
kernels. Both do the same; what needs the host in between (bad words, log-probabilities,
observers) calls the parts `decide` and `write` itself (`sampler.py`).

**Compiled** functions have their guards dropped, because all that they read is ours:
one is made per group, for a group's strategy, its fixed parameters and its block length
are constants of the graph. The number of requests is not: a group is padded to two at
least (`block_rows.pack`), and one graph serves any number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from vllm import envs
from vllm.logger import init_logger

from vllm_dlm.config.cache import POLICIES
from vllm_dlm.model_executor.planning.block_rows import NOT_VALID, Blocks, pack
from vllm_dlm.model_executor.planning.guesses import Settled, settle
from vllm_dlm.model_executor.reply import Reply
from vllm_dlm.model_executor.sampling.moving import write_moved
from vllm_dlm.model_executor.sampling.opening import opened
from vllm_dlm.model_executor.sampling.soft_memory import keep_soft
from vllm_dlm.model_executor.sampling.views import Extras, Measured

if TYPE_CHECKING:
    from vllm_dlm.config.cache import Cache
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.sampling.advance import Advance, Canvas
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.sampling.groups import Group
    from vllm_dlm.model_executor.sampling.safety import SafeDecision, Safety
    from vllm_dlm.model_executor.sampling.views import Views
    from vllm_dlm.model_executor.slots import RequestSlots

logger = init_logger(__name__)

Compiled: TypeAlias = "Callable[[torch.Tensor, Choice, Reply], None]"
"""`StepFunction.step`, or what was made of it."""

Settling: TypeAlias = "Callable[[torch.Tensor], Settled]"
"""`StepFunction.settle`, or what was made of it."""

NOT_COMPILED = frozenset({"branches", "probabilities"})
"""Needs of strategies whose steps compute more than tensors of fixed shapes."""

NO_EXTRAS = Extras()


class Asked(NamedTuple):
    """What some request of a group asks for. A compiled step serves all but the last
    two, and no canvas that a request has brought (`pins.py`)."""

    eotp: bool = True
    """The option of this name."""
    opening: bool = True
    """A block's first token alone in its first step (`opening.py`)."""
    growth: bool = False
    """A look whether the canvas is wide enough (`growth.py`)."""
    elastic: bool = False
    """All its requests do: a hole that widens and narrows (`moving.py`)."""


EVERYTHING = Asked()


class StepFunction:
    """The step of one group, and its compiled form; see the module docstring."""

    def __init__(
        self,
        group: Group,
        slots: RequestSlots,
        facts: EngineFacts,
        views: Views,
        safety: Safety,
        advance: Advance,
    ) -> None:
        self.group = group
        self.slots = slots
        self.facts = facts
        self.views = views
        self.safety = safety
        self.advance = advance
        self.compiled: Compiled | None = None
        """`step`, compiled; None where it is not to be, or cannot."""
        self.settled: Settling = self.settle
        """`settle`, compiled where `step` is."""

    def decide(
        self, blocks: Blocks, choice: Choice, extras: Extras, asked: Asked
    ) -> tuple[Measured, SafeDecision]:
        """What the group's strategy and the rules of decoding make of the rows.

        Args:
            choice: of the step's rows.
        """
        group, table = self.group, self.slots
        seats = blocks.requests.seat
        state = group.recall(seats, blocks.requests.step)
        needs = group.strategy.needs
        measured = self.views.view(blocks, choice, needs, state, extras)
        view = measured.view
        decision = group.strategy.select(view, group.row_params(table, blocks.slots))
        group.remember(seats, {**state, **(decision.state or {})}, blocks.leads)
        if asked.opening:
            decision = opened(view, decision, blocks.requests)
        held = self.safety.hold_to_rules(view, decision, blocks)
        if asked.growth:
            held = self.safety.grow(view, held, blocks)
        return measured, held

    def write(
        self,
        measured: Measured,
        decision: SafeDecision,
        blocks: Blocks,
        asked: Asked,
    ) -> tuple[SafeDecision, Canvas]:
        """Write a decision to the canvases."""
        if asked.eotp:
            decision = self.safety.cut(measured.view, decision, blocks)
        pins, cut = self.slots.pins, decision.truncate_at
        if pins is not None and cut is not None:
            decision = replace(decision, truncate_at=pins.spared(cut, blocks))
        keep_soft(self.group.memory, decision.soft, blocks)
        view = measured.view
        if asked.elastic:
            canvas = write_moved(self.slots, self.facts, view, decision, blocks)
        else:
            canvas = self.advance.write_canvas(view, decision, blocks)
        return decision, canvas

    def step(self, packed: torch.Tensor, choice: Choice, reply: Reply) -> None:
        """The whole step of R blocks; the reply's rows are written.

        Args:
            packed: [R, COLUMNS + B] int32, as of `block_rows.pack`.
            choice: of the step's rows.
        """
        blocks = Blocks.unpacked(packed, self.slots)
        measured, decision = self.decide(blocks, choice, NO_EXTRAS, EVERYTHING)
        decision, canvas = self.write(measured, decision, blocks, EVERYTHING)
        self.move_on(measured, decision, canvas, blocks, reply)

    def move_on(
        self,
        measured: Measured,
        decision: SafeDecision,
        canvas: Canvas,
        blocks: Blocks,
        reply: Reply,
    ) -> None:
        """Go on in the blocks or to the next ones: the end of a step."""
        strategy = self.group.strategy
        cache = cast("Cache", strategy.context.cache)
        self.advance.move_on(
            measured,
            decision,
            canvas,
            blocks,
            reply,
            counts_masks=POLICIES[cache].counts_masks,
            verifies=strategy.verifies,
        )

    def settle(self, packed: torch.Tensor) -> Settled:
        """Complete the plan of the group's requests that run ahead (`guesses.py`).

        Args:
            packed: [R, COLUMNS + B] int32, as of `block_rows.pack`.
        """
        return settle(packed, self.slots, self.facts)

    def compile(self, choice: Choice) -> None:
        """Have `step` compiled, if it can be.

        Args:
            choice: of the steps' rows.
        """
        name, start = self.group.strategy.name, time.perf_counter()
        compiled = _compiled(_own_code(self.step))
        settled = _compiled(_own_settling(self.settle))
        try:
            self._rehearse(compiled, choice)
            if self.facts.is_async:
                settled(self._nothing(13))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            logger.warning(
                "Steps of the strategy %s are not compiled (%s: %s): they take longer.",
                name,
                type(error).__name__,
                reason,
            )
            return
        seconds = time.perf_counter() - start
        logger.info("Compiled the steps of the strategy %s in %.1f s", name, seconds)
        self.compiled = compiled
        if self.facts.is_async:
            self.settled = settled

    def _rehearse(self, compiled: Compiled, choice: Choice) -> None:
        """Call a compiled step for rows that stand for nothing.

        Its graph is to serve any number of requests: sizes that vary from step to step
        are marked so, and differ from each other, or they would be taken for equal.
        """
        device, width, num_reqs = choice.candidate.device, self._width, 13
        packed = self._nothing(num_reqs)
        reply = Reply.empty(num_reqs, width + 40, device)
        with self.group.rehearsing(width + 60) as memory:
            varying = [(field, 0) for field in memory.values()]
            varying += [(reply.tokens, 0), (reply.tokens, 1), (reply.counts, 1)]
            varying += [(reply.masked, 0), (reply.masked, 1)]
            for tensor, dim in varying:
                torch._dynamo.mark_dynamic(tensor, dim)
            compiled(packed, choice, reply)

    def _nothing(self, num_reqs: int) -> torch.Tensor:
        """A packed group of some rows that stand for nothing; how many may vary.

        Args:
            num_reqs: of the batch, another number.
        """
        none = np.full((0, self._width), NOT_VALID)
        rows = pack({}, none, self.slots.num_slots, num_reqs)[:1].repeat(11, axis=0)
        packed = torch.from_numpy(rows).to(self.slots.device)
        torch._dynamo.mark_dynamic(packed, 0)
        return packed

    @property
    def _width(self) -> int:
        """B."""
        return self.group.strategy.block_length


class StepFunctions:
    """The step functions of an engine's groups, and which of them are compiled.

    Args:
        choice: of every step's rows.
    """

    def __init__(
        self,
        slots: RequestSlots,
        facts: EngineFacts,
        views: Views,
        safety: Safety,
        advance: Advance,
        choice: Choice,
    ) -> None:
        self._parts = slots, facts, views, safety, advance
        self._facts = facts
        self._choice = choice
        self._expects_nothing_more = False

    def of(self, group: Group) -> StepFunction:
        """The step of a group."""
        function = group.function
        if not isinstance(function, StepFunction):
            function = group.function = StepFunction(group, *self._parts)
            if self._facts.server.compile == "all":
                self._compile(function)
        return function

    def compile(self, expected: Callable[[], Iterable[Group]]) -> None:
        """Compile the steps of the groups that the server expects, once.

        With the first batch, which is mostly one of vLLM's own, before it serves.
        """
        if self._expects_nothing_more:
            return
        self._expects_nothing_more = True
        for group in expected():
            function = self.of(group)
            if function.compiled is None:
                self._compile(function)

    def _compile(self, function: StepFunction) -> None:
        strategy = function.group.strategy
        # What is made for one request alone is gone before compiling pays.
        if strategy.is_shared and not strategy.needs & NOT_COMPILED:
            _keep_kernels()
            function.compile(self._choice)


def _keep_kernels() -> None:
    """Let compiled kernels be found again by the next start of a server.

    Where nobody says where they go, they go to a temporary folder.
    """
    folder = Path(envs.VLLM_CACHE_ROOT) / "vllm_dlm_inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _drop_all(guards: list[object]) -> list[bool]:
    return [False for _ in guards]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(
        function,
        fullgraph=True,
        # A dictionary of each call's own: `torch.compile` takes its entries out.
        options={"guard_filter_fn": _drop_all},
    )


def _own_settling(settle: Settling) -> Settling:
    """As `_own_code`, for what settles plans."""

    def one_plan(packed: torch.Tensor) -> Settled:
        return settle(packed)

    return FunctionType(
        one_plan.__code__.replace(),
        one_plan.__globals__,
        closure=one_plan.__closure__,
    )


def _own_code(step: Compiled) -> Compiled:
    """A function that calls `step`, with a code object that no other function has.

    Compiled graphs are found by code object. Without guards, the one made for another
    group would be taken for this one.
    """

    def one_step(packed: torch.Tensor, choice: Choice, reply: Reply) -> None:
        step(packed, choice, reply)

    return FunctionType(
        one_step.__code__.replace(),
        one_step.__globals__,
        closure=one_step.__closure__,
    )
