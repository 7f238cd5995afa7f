# SPDX-License-Identifier: Apache-2.0
"""Groups of requests that decode by the same strategy, side by side in one batch.

A group shares strategy, non-numeric parameters and block length; numeric parameters
may differ from row to row and are columns of the request table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.columns import number_columns
from vllm_dlm.model_executor.sampling.soft_memory import soft_fields
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import StateField, Strategy, numeric_fields

if TYPE_CHECKING:
    from vllm_dlm.config.request import RequestConfig
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows, Blocks
    from vllm_dlm.model_executor.slots import RequestSlots

GroupKey = tuple[object, ...]

MOST_IDLE_GROUPS = 64
"""Groups without a request that are kept for the next one like them."""

KEPT_BYTES = 1 << 16
"""Memory that a group without a request may keep: to make it takes operations."""


class Group:
    """A strategy, and what it remembers of the requests that it decides.

    Each of these requests has a seat, a row of tensors, which grow with the number of
    requests in the group and, if they are large, are freed with the last one: there may
    be a group per block length. Row 0 is the dummy slot's seat (`columns.py`).
    """

    def __init__(
        self,
        strategy: Strategy,
        number: int,
        soft: Mapping[str, StateField] = MappingProxyType({}),
    ) -> None:
        self.strategy = strategy
        self.number = number
        self._fields = {**strategy.state, **soft}
        """All that is remembered: beside the strategy's state what its decisions feed
        the next forward (`soft_memory.py`)."""
        self._seats: dict[int, int] = {}
        """slot -> seat; never by row of a batch: rows change from step to step."""
        self.function: object = None
        """The group's `StepFunction`, once there has been a step; it goes with the
        group."""
        self._numbers = number_columns(strategy.Params)
        self._valid = {name: getattr(strategy.params, name) for name in self._numbers}
        self.memory = self._rows(0)
        """name of a field -> [seats + 1, ...]; no row at first."""

    def _rows(self, num_rows: int) -> dict[str, torch.Tensor]:
        """So many rows of which nothing is remembered."""
        # vLLM's runner works in inference mode, and its loader does not: a tensor is
        # to be of one kind wherever it is made.
        with torch.inference_mode(False):
            return {
                name: torch.full(
                    (num_rows, *field.shape),
                    field.fill,
                    dtype=field.dtype,
                    device=self.strategy.context.device,
                )
                for name, field in self._fields.items()
            }

    @property
    def num_bytes(self) -> int:
        """Bytes of the group's memory."""
        return sum(memory.nbytes for memory in self.memory.values())

    def admit(self, slot: int, *, forget: bool) -> int:
        """Give a new request a seat, and say which.

        Args:
            forget: whether the request's first step recalls what is in its seat: that
                is not a block's step 0, for which nothing is remembered.
        """
        taken = set(self._seats.values())
        seat = next(seat for seat in count(1) if seat not in taken)
        self._seats[slot] = seat
        if any(seat >= len(memory) for memory in self.memory.values()):
            self._add_seats()
        if forget:
            for name, field in self._fields.items():
                self.memory[name][seat] = field.fill
        return seat

    def _add_seats(self) -> None:
        """Double the number of seats; the first time, make the dummy slot's too."""
        have = max(len(memory) for memory in self.memory.values())
        more = self._rows(have - 1 if have > 1 else 2)
        with torch.inference_mode(False):
            self.memory = {
                name: torch.cat([memory, more[name]])
                for name, memory in self.memory.items()
            }

    def dismiss(self, slot: int) -> None:
        """Take back the seat of a request that has left."""
        del self._seats[slot]
        if not self._seats and self.num_bytes > KEPT_BYTES:
            self.memory = self._rows(0)

    @contextmanager
    def rehearsing(self, num_rows: int) -> Iterator[dict[str, torch.Tensor]]:
        """Memory of so many rows, in place of the group's own for a while."""
        kept, self.memory = self.memory, self._rows(num_rows)
        try:
            yield self.memory
        finally:
            self.memory = kept

    def row_params(
        self, table: RequestSlots, slots: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Numeric parameter -> [R]: those of the requests in slots [R].

        The dummy slot's are valid, too: what a strategy divides by may not be 0.
        """
        is_dummy = slots == table.num_slots
        params = {}
        for name, (is_int, column) in self._numbers.items():
            values = (table.numbers if is_int else table.numbers_f)[slots, column]
            params[name] = torch.where(is_dummy, self._valid[name], values)
        return params

    def temperature(self, table: RequestSlots, blocks: Blocks) -> torch.Tensor | None:
        """[R] float32: by what the strategy divides logits in a step; None for 1."""
        if not self.strategy.sets_temperature():
            return None  # as most do: their parameters need not be gathered for that
        params = self.row_params(table, blocks.slots)
        return self.strategy.temperature(blocks.requests.step, params)

    def recall(self, seats: torch.Tensor, step: torch.Tensor) -> dict[str, Any]:
        """name -> [R, ...]: what is remembered of each request's block.

        Args:
            seats: [R] int64, as `admit` gave them.
            step: [R] int64; nothing is remembered in step 0.
        """
        return {
            name: _where(step == 0, field.fill, self.memory[name][seats])
            for name, field in self.strategy.state.items()
        }

    def remember(
        self, seats: torch.Tensor, state: dict[str, Any], leads: torch.Tensor
    ) -> None:
        """Keep a step's state.

        Args:
            seats: [R] int64.
            state: name -> [R, ...].
            leads: [R] bool: the step wrote a block's lead, which a replay of the block
                does not repeat: it leaves no memory.
        """
        for name, field in self.strategy.state.items():
            memory = self.memory[name]
            memory[seats] = _where(leads, field.fill, state[name]).to(memory.dtype)


class StrategyGroups:
    """Maps slots to the groups that decide them."""

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self.slots = slots
        self.facts = facts
        self._groups: dict[GroupKey, Group] = {}
        self._group_of: dict[int, Group] = {}
        self._expected: dict[GroupKey, Group] = {}
        """Groups that are kept whether they have requests or not."""
        self._next_number = count()

    def expected(self) -> Iterable[Group]:
        """The groups whose steps are to be compiled when the engine starts."""
        if not self._expected:
            server = self.facts.server
            configs = [
                resolve(server, {"dlm": {"strategy": name}}, self.facts.defaults)
                for name in server.compiled_strategies()
            ]
            if self.facts.compiles and server.compile not in ("none", "all"):
                configs.append(self.facts.default_config)
            size = self.facts.max_canvas
            sized = [config.sized(size, size) for config in configs]
            self._expected = {group_key(one): self._group(one) for one in sized}
        return self._expected.values()

    def _group(self, config: RequestConfig, *, has_pattern: bool = False) -> Group:
        """The group of requests with these options, made if needed.

        Args:
            has_pattern: whether their texts must match patterns.
        """
        rule = STRATEGIES[config.strategy]
        has_pattern = has_pattern and rule.heeds_patterns
        key = group_key(config, has_pattern)
        if key not in self._groups or not self._groups[key].strategy.is_current():
            context = replace(self.facts.context(config.cache), has_pattern=has_pattern)
            strategy = rule(config.params, config.block_length, context)
            soft = {}
            if (inputs := rule.soft(config.params)) is not None:
                model = self.facts.model_config
                size, dtype = model.get_inputs_embeds_size(), model.dtype
                soft = soft_fields(inputs, config.block_length, size, dtype)
            self._groups[key] = Group(strategy, next(self._next_number), soft)
        return self._groups[key]

    def add(self, slot: int) -> None:
        """Put a new request's slot into its group, making the group if needed."""
        request = self.slots.requests[slot]
        group = self._group_of[slot] = self._group(
            request.config, has_pattern=request.pattern is not None
        )
        # A block that was preempted goes on behind its lead.
        seat = group.admit(slot, forget=request.layout.first_step > 0)
        # A lead that is the mask id (`reference_exact`) is a step that writes nothing.
        exact = request.config.reference_exact
        wasted = int(exact and self.facts.defaults.leads_blocks)
        if request.layout.is_elastic and request.layout.canvas is not None:
            # Each step writes, and each widening is one more mask to write.
            wasted += 2 * request.layout.canvas.most_widenings
        self.slots.assign_strategy(
            slot,
            group.strategy,
            group=group.number,
            seat=seat,
            wasted_steps=wasted,
        )

    def remove(self, slot: int) -> None:
        """Forget a request that has left, and groups that nobody will use."""
        group = self._group_of.pop(slot, None)
        if group is not None:
            group.dismiss(slot)
        # Clients may send ever new parameters: what nobody uses is not kept for ever.
        busy = {id(group) for group in self._group_of.values()}
        busy |= {id(group) for group in self._expected.values()}
        idle = [key for key, group in self._groups.items() if id(group) not in busy]
        spare = [key for key in idle if self._groups[key].strategy.is_shared]
        kept = set(spare[-MOST_IDLE_GROUPS:])
        for key in idle:
            if key not in kept:
                del self._groups[key]

    def of(self, rows: BlockRows) -> Group:
        """The group whose blocks these are."""
        return self._group_of[int(rows.slots_np[0])]


def _where(flags: torch.Tensor, fill: float, values: torch.Tensor) -> torch.Tensor:
    """`fill` in the rows [R] of `flags`, `values` [R, ...] elsewhere."""
    flags = flags.view(-1, *[1] * (values.dim() - 1))
    return torch.where(flags, torch.full_like(values, fill), values)


def group_key(config: RequestConfig, has_pattern: bool = False) -> GroupKey:
    """What requests must share to be decided by one strategy object."""
    numeric = numeric_fields(type(config.params))
    fixed = config.params.model_dump(exclude=set(numeric))
    return (
        config.strategy,
        config.block_length,
        config.window,
        config.cache,
        has_pattern,
        config.canvas is not None and config.canvas.is_elastic,
        *sorted((name, repr(value)) for name, value in fixed.items()),
    )
