# SPDX-License-Identifier: Apache-2.0
"""Groups of requests that decode by the same strategy, side by side in one batch.

A group shares strategy, non-numeric parameters and block length; numeric parameters
may differ from row to row and live in one tensor per parameter, addressed by slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_dlm.model_executor.host_slots import BLOCK, MASKS, OPEN_MASKS
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    NOT_DRAFTED,
    Decision,
    Strategy,
    View,
    numeric_fields,
)

if TYPE_CHECKING:
    from vllm_dlm.config.request import RequestConfig
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState

GroupKey = tuple[object, ...]


NEVER = 1 << 62
"""Steps that no block takes."""

MOST_IDLE_GROUPS = 64
"""Groups without a request that are kept for the next one like them."""


class Group:
    """A strategy, and what it remembers of the requests that it decides.

    Each of them has a seat in tensors that grow with the requests of the group at a
    time, and are given back with the last: there may be a group per block length.
    """

    def __init__(self, strategy: Strategy, num_slots: int, number: int) -> None:
        self.strategy = strategy
        self.number = number
        self._seats: dict[int, int] = {}
        """slot -> seat; never by row of a batch: rows change from step to step."""
        device = strategy.context.device
        self._seat_of = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._memory = self._empty(0)

    def _empty(self, num_seats: int) -> dict[str, torch.Tensor]:
        return {
            name: torch.full(
                (num_seats, *field.shape),
                field.fill,
                dtype=field.dtype,
                device=self.strategy.context.device,
            )
            for name, field in self.strategy.state.items()
        }

    @property
    def num_bytes(self) -> int:
        """What the group's memory takes."""
        return sum(memory.nbytes for memory in self._memory.values())

    def admit(self, slot: int) -> None:
        """Give a new request a seat, of which nothing is remembered."""
        taken = set(self._seats.values())
        seat = next(seat for seat in count() if seat not in taken)
        self._seats[slot] = seat
        if not self._memory:
            return
        self._seat_of[slot] = seat
        if seat == len(next(iter(self._memory.values()))):
            more = self._empty(max(seat, 1))
            self._memory = {
                name: torch.cat([memory, more[name]])
                for name, memory in self._memory.items()
            }
        for name, field in self.strategy.state.items():
            self._memory[name][seat] = field.fill

    def dismiss(self, slot: int) -> None:
        """Take back the seat of a request that has left."""
        del self._seats[slot]
        if not self._seats:
            self._memory = self._empty(0)

    def recall(self, slots: torch.Tensor, step: torch.Tensor) -> dict[str, Any]:
        """name -> [R, ...]: what is remembered of each request's block.

        Args:
            slots, step: [R] int64; nothing is remembered in step 0.
        """
        seats = self._seat_of[slots]
        return {
            name: _where(step == 0, field.fill, self._memory[name][seats])
            for name, field in self.strategy.state.items()
        }

    def remember(
        self, slots: torch.Tensor, state: dict[str, Any], seeds: torch.Tensor
    ) -> None:
        """Keep a step's state.

        Args:
            slots: [R] int64.
            state: name -> [R, ...].
            seeds: [R] bool: the step wrote a block's seed, which a replay of the block
                does not repeat: it leaves no memory.
        """
        seats = self._seat_of[slots]
        for name, field in self.strategy.state.items():
            memory = self._memory[name]
            memory[seats] = _where(seeds, field.fill, state[name]).to(memory.dtype)


class StrategyGroups:
    """Maps slots to strategies and runs each strategy on its rows."""

    def __init__(self, state: DlmModelState) -> None:
        self.state = state

        def per_slot(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(state.max_num_reqs, dtype=dtype, device=state.device)

        self.may_rewrite = per_slot(torch.bool)
        """[slots] bool: the slot's strategy may change decided positions."""
        self.step_limit = per_slot(torch.int64)
        """[slots] int64: steps after which a block ends in any case."""
        self.reference_steps = per_slot(torch.int64)
        """[slots] int64: with `reference_exact`, steps after which what is masked in a
        block is text; `NEVER` without it, and where the published loop has no such end.
        """
        self.drafts = per_slot(torch.bool)
        """[slots] bool: the slot's strategy has branches evaluated."""
        self._groups: dict[GroupKey, Group] = {}
        self._group_of: dict[int, Group] = {}
        self._group_number = np.full(state.max_num_reqs, -1)
        """[slots]: the number of each slot's group, to tell them apart in a batch."""
        self._next_number = count()
        self._numbers: dict[tuple[str, str], torch.Tensor] = {}

    def add(self, slot: int) -> None:
        """Put a new request's slot into its group, making the group if needed."""
        request = self.state.requests[slot]
        config = request.config
        strategy_class = STRATEGIES[config.strategy]
        numeric = numeric_fields(strategy_class.Params)
        key = group_key(config, numeric)
        if key not in self._groups or not self._groups[key].strategy.is_current():
            strategy = strategy_class(
                config.params, config.block_length, self.state.context(config.cache)
            )
            self._groups[key] = Group(
                strategy, self.state.max_num_reqs, next(self._next_number)
            )
        group = self._group_of[slot] = self._groups[key]
        request.strategy = group.strategy
        self._group_number[slot] = group.number
        group.admit(slot)
        self.may_rewrite[slot] = group.strategy.may_rewrite
        # A seed that is the mask id (`reference_exact`) is a step that writes nothing.
        wasted = config.reference_exact and self.state.defaults.seeds_blocks
        limit = group.strategy.step_limit(config.params)
        self.step_limit[slot] = limit + int(wasted)
        steps = None
        if config.reference_exact:
            scheduled = request.layout.steps_per_block
            steps = group.strategy.reference_steps(config.params, scheduled)
        self.reference_steps[slot] = NEVER if steps is None else steps
        self.drafts[slot] = "branches" in group.strategy.needs
        for name in numeric:
            self._tensor(strategy_class, name)[slot] = getattr(config.params, name)

    def remove(self, slot: int) -> None:
        """A request has left."""
        group = self._group_of.pop(slot, None)
        if group is not None:
            group.dismiss(slot)
        # Clients may send ever new parameters: what nobody uses is not kept for ever.
        busy = {id(group) for group in self._group_of.values()}
        idle = [key for key, group in self._groups.items() if id(group) not in busy]
        spare = [key for key in idle if self._groups[key].strategy.is_shared]
        kept = set(spare[-MOST_IDLE_GROUPS:])
        for key in idle:
            if key not in kept:
                del self._groups[key]

    def strategy_of(self, slot: int) -> Strategy:
        """The strategy that decides a slot."""
        return self._group_of[slot].strategy

    def ends(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which blocks end with this step in any case.

        Args:
            slots: [R] int64.

        Returns:
            [R] bool: those that do; of these, those that keep their masks as text.
        """
        taken = self.state.step[slots] + 1
        keeps_masks = taken >= self.reference_steps[slots]
        return keeps_masks | (taken >= self.step_limit[slots]), keeps_masks

    def _tensor(self, strategy: type[Strategy], name: str) -> torch.Tensor:
        key = (strategy.name, name)
        if key not in self._numbers:
            is_int = strategy.Params.model_fields[name].annotation is int
            self._numbers[key] = torch.zeros(
                self.state.max_num_reqs,
                dtype=torch.int64 if is_int else torch.float32,
                device=self.state.device,
            )
        return self._numbers[key]

    def needs(self, slots: np.ndarray) -> set[str]:
        """Statistics that any of these slots' strategies reads."""
        return {
            need for group, _ in self._split(slots) for need in group.strategy.needs
        }

    def _split(self, slots: np.ndarray) -> Iterator[tuple[Group, np.ndarray]]:
        """Each group of some slots [R], and which of them are its."""
        numbers = self._group_number[slots]
        for number in np.unique(numbers):
            (rows,) = (numbers == number).nonzero()
            yield self._group_of[int(slots[rows[0]])], rows

    def select(self, view: View, plan: SegmentPlan) -> Decision:
        """Let every group decide its rows; one `Decision` for the whole batch."""
        whole = Decision(commit=torch.zeros_like(view.masked))
        for group, rows in self._split(plan.slots_np):
            strategy = group.strategy
            if len(rows) == len(plan.slots_np):
                index: slice | torch.Tensor = slice(None)
                part = view.take(slice(None), strategy.block_length)
            else:
                index = torch.from_numpy(rows).to(self.state.device, non_blocking=True)
                part = view.take(rows, strategy.block_length)
            slots = plan.slots[index]
            part = replace(part, state=group.recall(slots, part.step))
            numbers = {
                name: self._tensor(type(strategy), name)[slots]
                for name in numeric_fields(strategy.Params)
            }
            decision = strategy.select(part, numbers)
            state = {**part.state, **(decision.state or {})}
            group.remember(slots, state, plan.seeds[index])
            _merge(whole, decision, index, strategy, view)
        return whole


def rows_read_by(strategy: Strategy) -> int:
    """Of which positions a strategy reads the logits: a value of `HostSlots.reads`."""
    if strategy.logit_rows == "block":
        return BLOCK
    # In the course of its branches a request may reach the next sub-block.
    return MASKS if "branches" in strategy.needs else OPEN_MASKS


def _where(flags: torch.Tensor, fill: float, values: torch.Tensor) -> torch.Tensor:
    """`fill` in the rows [R] of `flags`, `values` [R, ...] elsewhere."""
    flags = flags.view(-1, *[1] * (values.dim() - 1))
    return torch.where(flags, torch.full_like(values, fill), values)


def group_key(config: RequestConfig, numeric: list[str]) -> GroupKey:
    """What requests must share to be decided by one strategy object."""
    fixed = config.params.model_dump(exclude=set(numeric))
    return (
        config.strategy,
        config.block_length,
        config.cache,
        *sorted((name, repr(value)) for name, value in fixed.items()),
    )


def _merge(
    whole: Decision,
    part: Decision,
    index: slice | torch.Tensor,
    strategy: Strategy,
    view: View,
) -> None:
    """Scatter one group's decision into the batch's."""
    width = strategy.block_length
    defaults = {
        "commit": torch.zeros_like(view.masked),
        "new_tokens": view.candidate,
        "edit": torch.zeros_like(view.masked),
        "remask": torch.zeros_like(view.masked),
        "hold": torch.zeros_like(view.step, dtype=torch.bool),
        "idle": torch.zeros_like(view.step, dtype=torch.bool),
        "truncate_at": torch.full_like(view.step, -1),
        "branch": torch.zeros_like(view.candidate),
        "step_ahead": torch.zeros_like(view.candidate),
        "draft_tokens": view.candidate,
        "draft_rank": torch.full_like(view.candidate, NOT_DRAFTED),
    }
    for name, default in defaults.items():
        decided = getattr(part, name)
        if decided is None:
            continue
        if getattr(whole, name) is None:
            setattr(whole, name, default.clone())
        target = getattr(whole, name)
        if target.dim() == 2:
            target[index, :width] = decided
        else:
            target[index] = decided
