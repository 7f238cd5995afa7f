# SPDX-License-Identifier: Apache-2.0
"""The kit for strategies' authors: what breaks the contract does not pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field

from vllm_dlm.strategies.base import (
    Decision,
    Params,
    Soft,
    SoftInputs,
    StateField,
    Strategy,
    View,
    best_masked,
)
from vllm_dlm.testing import check_strategy
from vllm_dlm.testing.compiling import why


class CutParams(Params):
    cut: float = Field(default=0.5, ge=0.0, le=1.0)


class Rule(Strategy):
    """A rule that keeps the contract; each subclass breaks it in one way."""

    name = "rule"
    paper = "none"
    summary = "every token that is sure"
    Params = CutParams

    def select(self, view: View, row_params: Any) -> Decision:
        sure = view.confidence >= row_params["cut"][:, None]
        return Decision((sure & view.masked) | best_masked(view))


class NotFlags(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(super().select(view, row_params).commit.float())


class WrongShape(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        decision = super().select(view, row_params)
        return replace(decision, idle=~decision.commit)


class NoDecision(Rule):
    def select(self, view: View, row_params: Any) -> Any:
        return super().select(view, row_params).commit


class Changes(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        view.masked.logical_and_(view.confidence > 0.5)
        return super().select(view, row_params)


class Draws(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(view.masked & (torch.rand(view.masked.shape) < 0.5))


class Counts(Rule):
    """It remembers on itself."""

    def select(self, view: View, row_params: Any) -> Decision:
        self.calls = getattr(self, "calls", 0) + 1
        decision = super().select(view, row_params)
        return decision if self.calls % 2 else Decision(view.masked)


class OverRows(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(view.masked & (view.confidence >= view.confidence.max()))


class FirstNumber(Rule):
    """One request's number, for all."""

    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(view.masked & (view.confidence >= row_params["cut"][0]))


class Padding(Rule):
    """Rows of no request count."""

    def select(self, view: View, row_params: Any) -> Decision:
        decision = super().select(view, row_params)
        some = (~view.valid.any(dim=1)).any()
        return Decision(torch.where(some, view.masked, decision.commit))


class Undeclared(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(view.masked & (view.entropy < 0.5))


class Remembers(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        decision = super().select(view, row_params)
        return replace(decision, state={"seen": decision.commit})


class WrongState(Remembers):
    state: ClassVar[dict[str, StateField]] = {"seen": StateField(dtype=torch.int64)}


class Remasks(Rule):
    logit_rows = "block"

    def select(self, view: View, row_params: Any) -> Decision:
        decision = super().select(view, row_params)
        return replace(decision, remask=view.decided & (view.confidence < 0.5))


class Blind(Remasks):
    logit_rows = "masked"
    may_rewrite = True


class CutsTooFar(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        decision = super().select(view, row_params)
        return replace(decision, truncate_at=view.valid.sum(dim=1))


class OwnTokens(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(view.masked, new_tokens=view.candidate ^ 1)


class CutsAnywhere(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        return Decision(view.masked, truncate_at=view.step * 0)


class NotBest(Rule):
    needs = frozenset({"best"})
    writes = "best"


class CutsBest(NotBest):
    def select(self, view: View, row_params: Any) -> Decision:
        ends = view.is_eos & (view.best == view.candidate)
        cut = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), -1)
        return Decision(view.masked, new_tokens=view.best, truncate_at=cut)


class SoftUndeclared(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        weights = view.confidence[..., None]
        return Decision(view.masked, soft=Soft(~view.masked, weights))


class SoftWeights(SoftUndeclared):
    @classmethod
    def soft(cls, params: Params) -> SoftInputs:
        return SoftInputs("top", "replace", 2)


class SoftDrafts(SoftWeights):
    @classmethod
    def looks_ahead(cls, params: Params) -> int:
        return 8


class Misspelt(Rule):
    needs = frozenset({"margins"})


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (NotFlags, r"commit is float32 \[12, 8\], but must be \[R, B\] = bool"),
        (WrongShape, r"idle is bool \[12, 8\], but must be \[R\] = bool \[12\]"),
        (NoDecision, "must return a Decision, not Tensor"),
        (Changes, r"changed view: masked\[\d+, \d+\] is True and False.*make new"),
        (Draws, "once more: commit.*View.uniform"),
        (Counts, "once more: commit.*not on self"),
        (OverRows, r"rows \[\d+\]: among 12 rows.*never over dim=0"),
        (FirstNumber, r"among 12 rows and among these: .*row_params\['name'\]"),
        (Padding, "with rows of no request behind: commit"),
        (Undeclared, "TypeError.*not in `needs` are best, branches, entropy"),
        (Remembers, "has seen, which `state` does not declare"),
        (WrongState, r"'seen'\] is bool \[12, 8\], but is declared as int64 \[12\]"),
        (Remasks, "set `may_rewrite = True`"),
        (OwnTokens, "other tokens than candidates; set `own_tokens = True`"),
        (CutsAnywhere, "no candidate ends the text; set `own_tokens = True`"),
        (NotBest, "other tokens than best tokens; set `own_tokens = True`"),
        (CutsBest, "no candidate ends the text; set `own_tokens = True`"),
        (Blind, "set `logit_rows = 'block'`"),
        (CutsTooFar, "truncate_at must be a position of the block, 0 to 7, or -1"),
        (Misspelt, "`needs` names margins; there are best, branches, entropy"),
        (SoftUndeclared, "soft is set, .*return SoftInputs from `soft"),
        (SoftWeights, r"Decision.soft.weights is float32 \[12, 8, 1\], but must be"),
        (SoftDrafts, "a strategy with branches, .*cannot have soft inputs"),
    ],
)
def test_what_breaks_the_contract_is_said(broken: type[Strategy], says: str):
    with pytest.raises(AssertionError, match=f"(?s){says}"):
        check_strategy(broken, compiling="no")


def test_the_rule_that_they_break_keeps_it():
    check_strategy(Rule, compiling="trace", required=True)


class Waits(Rule):
    """A branch on a number of the device: allowed, and slow."""

    def select(self, view: View, row_params: Any) -> Decision:
        if view.masked.sum().item() == 0:
            return Decision(view.masked)
        return super().select(view, row_params)


class Loops(Rule):
    def select(self, view: View, row_params: Any) -> Decision:
        cut = row_params["cut"]
        rows = [view.confidence[row] >= cut[row] for row in range(len(view.step))]
        return Decision((torch.stack(rows) & view.masked) | best_masked(view))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Waits, "depends on a number of the device (File"),
        (Waits, "in select: if view.masked.sum().item() == 0:)"),
        (Loops, "depend on the number of rows"),
    ],
)
def test_what_cannot_be_compiled_is_told_in_a_line(rule: type[Strategy], says: str):
    report = check_strategy(rule, compiling="trace")
    assert report.traces is False
    reason = report.findings["compiles"]
    assert reason.startswith("no, it runs eagerly: ") and "\n" not in reason
    assert says in reason
    with pytest.raises(AssertionError, match="rule cannot be compiled: "):
        check_strategy(rule, compiling="trace", required=True)


def test_a_compiler_is_quoted():
    text = "CppCompileError: C++ compile error\n\nOutput:\na.cpp:6:7: error: no match\n"
    assert why(RuntimeError(text)) == "CppCompileError: C++ compile error: no match"


def test_parameters_are_checked_first():
    with pytest.raises(ValueError, match="cut"):
        check_strategy(Rule, params={"cut": 2.0})
    with pytest.raises(ValueError, match="rows must be at least 3"):
        check_strategy(Rule, rows=2)
