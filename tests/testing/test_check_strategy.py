# SPDX-License-Identifier: Apache-2.0
"""The kit for strategies' authors: ours pass, and what breaks the contract does not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from reference.registered import (
    GIVEN,
    NAMES,
    OF_CAUSAL_MODELS,
    OF_EDITING_MODELS,
    OF_RANDOM_TOKENS,
    build,
)
from tiers import fast

from vllm_dlm.config.aliases import resolve
from vllm_dlm.strategies import STRATEGIES
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
from vllm_dlm.strategies.threshold import Threshold
from vllm_dlm.testing import check_strategy
from vllm_dlm.testing.blocks import MASK_ID, RandomBlocks, padded
from vllm_dlm.testing.check import CONTEXT
from vllm_dlm.testing.compiling import why

EAGER = {"credit", "freedave", "klass", "linear_spec", "lopa", "prophet"}
"""They read more of a step than a compiled function has."""


# -- ours ------------------------------------------------------------------


ALL = [*NAMES, *OF_EDITING_MODELS, *OF_CAUSAL_MODELS, *OF_RANDOM_TOKENS]


QUICK = (
    # One of each kind: stateless, with a memory, with edits, of several forwards, ...
    *("static", "threshold", "credit", "hierarchy", "freedave", "replay"),
    *(*OF_EDITING_MODELS, *OF_CAUSAL_MODELS, *OF_RANDOM_TOKENS),
)


@pytest.mark.parametrize("name", fast(*QUICK, of=ALL))
def test_registered_strategies_keep_the_contract(name: str):
    check_strategy(STRATEGIES[name], params=GIVEN.get(name), compiling="no")


@pytest.mark.parametrize("name", fast("saber", "slowfast", "lopa", of=ALL))
def test_registered_strategies_can_be_compiled(name: str):
    """With edits, with a memory, and one that cannot; others in the slow tier."""
    report = check_strategy(
        STRATEGIES[name],
        params=GIVEN.get(name),
        compiling="trace",
        required=name not in EAGER,
    )
    assert report.traces == (name not in EAGER)


@pytest.mark.slow
# With a filter, edits, a memory, and a length that changes.
@pytest.mark.parametrize("name", ["learn2pd", "joint", "slowfast", "levenshtein"])
def test_registered_strategies_decide_alike_compiled(name: str):
    # Of a model with a filter, for learn2pd.
    context = replace(CONTEXT, model=str(resolve("llada-tiny")))
    report = check_strategy(
        STRATEGIES[name],
        params=GIVEN.get(name),
        block_length=32,
        required=True,
        context=context,
    )
    assert report.findings["compiled"] == "decides as eagerly, bit for bit"


def test_a_compiled_strategy_decides_alike():
    report = check_strategy(Threshold, params={"threshold": 0.8}, required=True)
    assert report.traces
    printed = str(report)
    assert printed.startswith("threshold (threshold=0.8), blocks of 8: 24 steps of 12")
    assert "decides as eagerly, bit for bit" in printed


OTHERS: dict[str, dict[str, Any]] = {
    "threshold": {"at_least": "scheduled", "strict": True},
    "static": {"mode": "margin"},
    "eoser": {"schedule": "doubling"},
    "dream": {"alg": "origin"},
    "credit": {"mode": "parameter_free"},
}


@pytest.mark.parametrize(
    ("name", "block_length"),
    fast(
        *zip(OTHERS, (1, 5, 32, 5, 32), strict=True),
        of=itertools.product(OTHERS, (1, 5, 32)),
    ),
)
def test_other_parameters_and_lengths(name: str, block_length: int):
    check_strategy(
        STRATEGIES[name],
        params=OTHERS[name],
        block_length=block_length,
        compiling="no",
        seed=block_length,
    )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("credit", {"threshold": 0.3}),
        ("joint", {"edit_threshold": 0.0}),
        ("joint", {"edit": False, "penalty": 3.0}),
    ],
)
def test_who_heeds_patterns_writes_candidates_alone(name: str, params: Any):
    context = replace(CONTEXT, has_pattern=True)
    check_strategy(STRATEGIES[name], params=params, compiling="no", context=context)


# -- what it shows a strategy ----------------------------------------------


def views(name: str, steps: int = 40, rows: int = 16) -> list[View]:
    """What a strategy of ours sees."""
    strategy = build(name)
    numbers = {"threshold": torch.full((rows,), 0.75)}
    blocks = RandomBlocks(strategy, [strategy.params] * rows, numbers, seed=1)
    seen = []
    for _ in range(steps):
        seen.append(blocks.view())
        blocks.go_on(seen[-1], strategy.select(seen[-1], numbers))
    return seen


def test_views_are_those_of_an_engine():
    for view in views("threshold"):
        assert not (view.masked & ~view.masks).any()
        assert not (view.decided & view.masks).any()
        assert (view.masked.any(dim=1)).all()
        assert torch.equal(view.tokens == MASK_ID, view.masks)
        assert (view.confidence[~view.masked] == 0).all()
        assert torch.equal(view.candidate[~view.masked], view.tokens[~view.masked])
        assert not (view.is_eos & ~view.valid).any()
        for name, value in vars(view).items():
            if isinstance(value, torch.Tensor):
                assert not value.isnan().any(), name


def test_views_have_what_an_engine_has():
    """Once in forty steps at least, each of the cases that strategies go wrong in."""
    seen = views("threshold")

    def some(flags: Any) -> bool:
        return any(bool(flags(view).any()) for view in seen)

    assert some(lambda v: v.masked & (v.confidence == 0))
    assert some(lambda v: v.masked & (v.confidence == 1))
    assert some(lambda v: v.masked & (v.confidence == 0.75))
    assert some(lambda v: ~v.valid)
    assert some(lambda v: v.valid & (v.positions < 0))
    assert some(lambda v: v.masks & ~v.masked)  # further sub-blocks
    assert some(lambda v: v.decided & (v.step == 0)[:, None])
    assert some(lambda v: v.step > 2)
    assert some(lambda v: v.step != v.step[0])
    best = [view.confidence.topk(2, dim=1).values for view in seen]
    assert any((two[:, 0] == two[:, 1]).any() for two in best)


def test_views_have_the_state_of_the_steps_before():
    for view in views("ass"):
        begins = view.step == 0
        assert (view.state["masks"][begins] == 0).all()
        assert (view.state["masks"][~begins] > 0).all()


def test_padding_is_rows_of_no_request():
    [view, *_] = views("freedave")
    more = padded(view, 3)
    rows = len(view.step)
    assert len(more.step) == rows + 3
    assert not more.masked[rows:].any() and not more.valid[rows:].any()
    assert (more.steps[rows:] == 1).all()
    again = more.take(slice(0, rows), 8)
    assert torch.equal(again.branches.masked, view.branches.masked)


# -- what breaks the contract ----------------------------------------------


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
