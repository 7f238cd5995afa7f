# SPDX-License-Identifier: Apache-2.0
"""What a strategy declares, and whether its decisions are of that kind."""

from __future__ import annotations

from typing import Any

import torch

from vllm_dlm.strategies.base import (
    Decision,
    Params,
    Soft,
    StateField,
    Strategy,
    View,
)

NEEDS = frozenset(
    ["entropy", "margin", "uniform", "other", "best", "noise"]
    + ["probabilities", "branches"]
)

FLAGS = ("commit", "edit", "remask")
"""Fields of a decision that are [R, B] bool."""
TOKENS = (
    *("new_tokens", "branch", "step_ahead", "draft_tokens", "draft_rank"),
    *("held", "settled"),
)
"""[R, B] int64."""
ROWS = {"hold": torch.bool, "idle": torch.bool, "truncate_at": torch.int64}
"""[R]."""
REWRITING = ("edit", "remask")
DRAFTING = ("branch", "draft_tokens", "draft_rank")


def check_declarations(strategy_class: type[Strategy]) -> None:
    """Check what the class says of itself.

    Raises:
        AssertionError: the engine would not understand it.
    """
    called = strategy_class.__name__
    for name in ("name", "paper", "summary"):
        text = getattr(strategy_class, name, None)
        assert isinstance(text, str) and text, (
            f"{called}: `{name}` must be set to a text: users read it in "
            "`vllm-dlm strategies`"
        )
    assert issubclass(strategy_class.Params, Params), (
        f"{called}: `Params` must be a subclass of vllm_dlm.strategies.base.Params"
    )
    unknown = sorted(strategy_class.needs - NEEDS)
    assert not unknown, (
        f"{called}: `needs` names {', '.join(unknown)}; there are "
        f"{', '.join(sorted(NEEDS))}"
    )
    assert strategy_class.logit_rows in ("masked", "block"), (
        f"{called}: `logit_rows` must be 'masked' or 'block', not "
        f"{strategy_class.logit_rows!r}"
    )
    assert strategy_class.writes in ("candidate", "best"), (
        f"{called}: `writes` must be 'candidate' or 'best', not "
        f"{strategy_class.writes!r}"
    )
    assert strategy_class.noise in ("mask", "uniform"), (
        f"{called}: `noise` must be 'mask' or 'uniform', not {strategy_class.noise!r}"
    )


def check_decision(
    strategy: Strategy, view: View, decision: Decision, where: str
) -> None:
    """Check shapes and types of one decision.

    Args:
        where: of which strategy and step, for the message.

    Raises:
        AssertionError: the engine could not carry it out.
    """
    assert isinstance(decision, Decision), (
        f"{where}: select must return a Decision, not {type(decision).__name__}"
    )
    rows, width = view.masked.shape
    for name in FLAGS:
        _check(decision, name, (rows, width), torch.bool, where)
    for name in TOKENS:
        _check(decision, name, (rows, width), torch.int64, where)
    for name, dtype in ROWS.items():
        _check(decision, name, (rows,), dtype, where)
    assert decision.commit is not None, f"{where}: Decision.commit must be set"
    for name in REWRITING:
        assert strategy.may_rewrite or getattr(decision, name) is None, (
            f"{where}: Decision.{name} is set, but tokens that were decided may be "
            "streamed already: set `may_rewrite = True`, so that blocks are streamed "
            "when they are complete"
        )
    for name in DRAFTING:
        assert "branches" in strategy.needs or getattr(decision, name) is None, (
            f"{where}: Decision.{name} is set, but nothing evaluates drafts of a "
            "strategy without 'branches' in `needs`"
        )
    assert not strategy.may_rewrite or strategy.logit_rows == "block", (
        f"{where}: a strategy that may rewrite must read what the model thinks of "
        "decided tokens: set `logit_rows = 'block'`"
    )
    if decision.truncate_at is not None:
        cut = decision.truncate_at
        assert bool(((cut >= -1) & (cut < width)).all()), (
            f"{where}: Decision.truncate_at must be a position of the block, 0 to "
            f"{width - 1}, or -1; it has {sorted(set(cut.tolist()))}"
        )
    is_held = strategy.context.has_pattern or not strategy.heeds_patterns
    if is_held and strategy.why_unconstrained(strategy.params) is None:
        _check_tokens(strategy, view, decision, where)
    _check_soft(strategy, view, decision, where)
    _check_state(strategy, view, decision, where)


def _check_soft(strategy: Strategy, view: View, decision: Decision, where: str) -> None:
    """Mixtures of the kind that the strategy has declared."""
    declared, soft = strategy.soft(strategy.params), decision.soft
    drafts = strategy.branches(strategy.params) > 1
    drafts |= strategy.looks_ahead(strategy.params) > 0
    assert declared is None or not drafts, (
        f"{where}: what is drafted is fed as it is: a strategy with branches, or one "
        "that looks ahead, cannot have soft inputs"
    )
    if soft is None:
        return
    assert declared is not None, (
        f"{where}: Decision.soft is set, but engines make soft inputs only for "
        "strategies that say which: return SoftInputs from `soft(params)`"
    )
    rows, width = view.masked.shape
    called, shape = "Decision.soft", (rows, width, declared.num_ids)
    _check(soft, "where", (rows, width), torch.bool, where, called)
    _check(soft, "weights", shape, torch.float32, where, called)
    _check(soft, "ids", shape, torch.int64, where, called)
    assert (soft.ids is not None) == (declared.source == "top"), (
        f"{where}: Decision.soft.ids names the tokens that are mixed where the source "
        f"is 'top', and none where it is 'full'; here it is {declared.source!r}"
    )


def _check_tokens(
    strategy: Strategy, view: View, decision: Decision, where: str
) -> None:
    """A decision of which nothing spoils a text that must match a pattern."""
    lesson = "; set `own_tokens = True`, so that texts with a pattern are refused"
    own, called = view.candidate, "candidates"
    if strategy.writes == "best":
        assert view.best is not None, f"{where}: `needs` must name 'best'"
        own, called = view.best, "best tokens"
    tokens = view.candidate if decision.new_tokens is None else decision.new_tokens
    others = decision.commit & view.masked & (tokens != own)
    assert not others.any(), f"{where}: writes other tokens than {called}{lesson}"
    if decision.edit is not None:
        assert not (decision.edit & view.decided & (tokens != own)).any(), (
            f"{where}: edits to other tokens than {called}{lesson}"
        )
    if decision.truncate_at is not None:
        cut = decision.truncate_at.clamp(min=0)[:, None]
        at_end = view.is_eos.gather(1, cut)[:, 0] & (strategy.writes == "candidate")
        at_end |= decision.truncate_at < 0
        assert at_end.all(), (
            f"{where}: cuts the canvas where no candidate ends the text{lesson}"
        )


def _check(
    decision: Decision | Soft,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    where: str,
    called: str = "Decision",
) -> None:
    value: Any = getattr(decision, name)
    if value is None:
        return
    wanted = f"{_called(dtype)} {list(shape)}"
    axes = ("[R]", "[R, B]", "[R, B, K]")[len(shape) - 1]
    assert isinstance(value, torch.Tensor), (
        f"{where}: {called}.{name} must be a tensor, {axes} = {wanted}, not "
        f"{type(value).__name__}"
    )
    assert value.dtype == dtype and value.shape == shape, (
        f"{where}: {called}.{name} is {_called(value.dtype)} {list(value.shape)}, but "
        f"must be {axes} = {wanted}, R requests by B positions of a block"
    )


def _check_state(
    strategy: Strategy, view: View, decision: Decision, where: str
) -> None:
    rows = len(view.step)
    for name, field in strategy.state.items():
        assert isinstance(field, StateField), (
            f"{where}: `state` must map names to StateFields; {name} is a "
            f"{type(field).__name__}"
        )
    for name, value in (decision.state or {}).items():
        assert name in strategy.state, (
            f"{where}: Decision.state has {name}, which `state` does not declare: "
            "nothing would remember it"
        )
        field = strategy.state[name]
        shape = (rows, *field.shape)
        fits = torch.can_cast(value.dtype, field.dtype)
        assert value.shape == shape and fits, (
            f"{where}: Decision.state[{name!r}] is {_called(value.dtype)} "
            f"{list(value.shape)}, but is declared as {_called(field.dtype)} "
            f"{list(shape)}"
        )


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
