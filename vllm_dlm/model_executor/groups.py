# SPDX-License-Identifier: Apache-2.0
"""Groups of requests that decode by the same strategy, side by side in one batch.

A group shares strategy, non-numeric parameters and block length; numeric parameters
may differ from row to row and live in one tensor per parameter, addressed by slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    Decision,
    Strategy,
    View,
    numeric_fields,
)

if TYPE_CHECKING:
    from vllm_dlm.model_executor.segments import SegmentPlan
    from vllm_dlm.model_executor.state import DlmModelState
    from vllm_dlm.request_config import RequestConfig

GroupKey = tuple[object, ...]


class StrategyGroups:
    """Maps slots to strategies and runs each strategy on its rows."""

    def __init__(self, state: DlmModelState) -> None:
        self.state = state
        self.may_rewrite = torch.zeros(
            state.max_num_reqs, dtype=torch.bool, device=state.device
        )
        """[slots] bool: the slot's strategy may change decided positions."""
        self._strategies: dict[GroupKey, Strategy] = {}
        self._strategy_of: dict[int, Strategy] = {}
        self._numbers: dict[tuple[str, str], torch.Tensor] = {}

    def add(self, slot: int) -> None:
        """Put a new request's slot into its group, making the group if needed."""
        config = self.state.requests[slot].config
        strategy_class = STRATEGIES[config.strategy]
        numeric = numeric_fields(strategy_class.Params)
        key = group_key(config, numeric)
        if key not in self._strategies:
            self._strategies[key] = strategy_class(
                config.params, config.block_length, self.state.context(config.cache)
            )
        self._strategy_of[slot] = self._strategies[key]
        self.may_rewrite[slot] = strategy_class.may_rewrite
        for name in numeric:
            self._tensor(strategy_class, name)[slot] = getattr(config.params, name)

    def remove(self, slot: int) -> None:
        """A request has left."""
        self._strategy_of.pop(slot, None)

    def strategy_of(self, slot: int) -> Strategy:
        """The strategy that decides a slot."""
        return self._strategy_of[slot]

    def renew(self, strategy: str) -> None:
        """Build a strategy anew for requests to come, as when it has learned.

        Requests that are running keep the object they began with.
        """
        self._strategies = {
            key: value for key, value in self._strategies.items() if key[0] != strategy
        }

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

    def needs(self, slots: list[int]) -> set[str]:
        """Statistics that any of these slots' strategies reads."""
        return {need for slot in slots for need in self._strategy_of[slot].needs}

    def select(self, view: View, plan: SegmentPlan) -> Decision:
        """Let every group decide its rows; one `Decision` for the whole batch."""
        members: dict[int, list[int]] = {}
        for row, slot in enumerate(plan.slots_cpu):
            members.setdefault(id(self._strategy_of[slot]), []).append(row)
        whole = Decision(commit=torch.zeros_like(view.masked))
        for rows in members.values():
            strategy = self._strategy_of[plan.slots_cpu[rows[0]]]
            if len(rows) == len(plan.slots_cpu):
                index: slice | torch.Tensor = slice(None)
            else:
                index = torch.tensor(rows, device=view.slots.device)
            part = _rows(view, index, strategy.block_length)
            numbers = {
                name: self._tensor(type(strategy), name)[part.slots]
                for name in numeric_fields(strategy.Params)
            }
            _merge(whole, strategy.select(part, numbers), index, strategy, view)
        return whole


def group_key(config: RequestConfig, numeric: list[str]) -> GroupKey:
    """What requests must share to be decided by one strategy object."""
    fixed = config.params.model_dump(exclude=set(numeric))
    return (
        config.strategy,  # first: `StrategyGroups.renew` looks here
        config.block_length,
        config.cache,
        *sorted((name, repr(value)) for name, value in fixed.items()),
    )


def _rows(view: View, index: slice | torch.Tensor, width: int) -> View:
    """The view of some rows, cut to their own block length."""

    def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        rows = tensor[index]
        return rows[:, :width] if rows.dim() == 2 else rows

    parts: dict[str, Any] = {name: pick(part) for name, part in vars(view).items()}
    return View(**parts)


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
