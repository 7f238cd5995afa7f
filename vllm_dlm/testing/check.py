# SPDX-License-Identifier: Apache-2.0
"""check_strategy: one strategy against the contract of `strategies/base.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Params,
    Soft,
    Strategy,
    View,
    numeric_fields,
)
from vllm_dlm.strategies.probabilities import Probabilities
from vllm_dlm.testing.blocks import EDIT_TOKENS, RandomBlocks, padded
from vllm_dlm.testing.compiling import compile_and_compare, why_eager
from vllm_dlm.testing.declared import NEEDS, check_decision, check_declarations
from vllm_dlm.testing.report import Report

Compiling = Literal["run", "trace", "no"]

CONTEXT = Context(device=torch.device("cpu"), model="no-model", edit_tokens=EDIT_TOKENS)
"""Of a server that has no files for strategies."""


@dataclass(frozen=True)
class Step:
    """One step of R requests."""

    name: str
    """With which it is found again."""
    view: View
    numbers: dict[str, torch.Tensor]
    """name -> [R]: the requests' numeric parameters."""

    def take(self, rows: np.ndarray) -> Step:
        """Some rows [n] of it, in that order."""
        index = torch.from_numpy(rows)
        return Step(
            f"{self.name}, rows {rows.tolist()}",
            self.view.take(rows, self.view.masked.shape[1]),
            {name: number[index] for name, number in self.numbers.items()},
        )

    def padded(self, more: int) -> Step:
        """With rows of no request behind its own."""
        numbers = {
            name: torch.cat([number, number[:1].expand(more)])
            for name, number in self.numbers.items()
        }
        return Step(f"{self.name}, padded", padded(self.view, more), numbers)


def check_strategy(
    strategy_class: type[Strategy],
    *,
    params: Mapping[str, Any] | None = None,
    block_length: int = 8,
    rows: int = 12,
    steps: int = 24,
    seed: int = 0,
    compiling: Compiling = "run",
    required: bool = False,
    context: Context = CONTEXT,
) -> Report:
    """Check that a strategy keeps the contract, on random blocks that it decodes.

    Args:
        strategy_class: the strategy.
        params: its parameters; defaults where nothing is given. Numeric ones differ
            from row to row: those of the first row are as given.
        block_length: positions of a block; of all the output, for a strategy whose
            `scope` is "canvas".
        rows: requests in a step, at least 3.
        steps: that are decided.
        seed: of all that is random.
        compiling: "run" compares the compiled strategy with the eager one, and takes
            10 to 40 seconds where nothing is cached; "trace" finds out within a second
            or two whether it can be compiled; "no" does neither.
        required: fail if the strategy cannot be compiled. Otherwise the report says
            why: the engine runs such a strategy eagerly.
        context: what the strategy is told of the engine.

    Raises:
        AssertionError: the contract is broken; the message says where, and what to do.
        ValueError: the parameters are not valid.
    """
    if rows < 3:
        raise ValueError(f"rows must be at least 3, not {rows}")
    check_declarations(strategy_class)
    given = strategy_class.Params(**(params or {}))
    strategy_class.validate(given, block_length, context)
    row_params = _vary(strategy_class, given, block_length, context, rows, seed)
    numbers = _numbers(strategy_class, row_params)

    def build() -> Strategy:
        return strategy_class(given, block_length, context)

    named = ", ".join(f"{name}={value!r}" for name, value in (params or {}).items())
    report = Report(strategy_class.name, named or "defaults", block_length, steps, rows)
    strategy = build()
    taken, decisions = [], []
    blocks = RandomBlocks(strategy, row_params, numbers, seed)
    for number in range(steps):
        step = Step(f"step {number} of seed {seed}", blocks.view(), numbers)
        decision = decide(strategy, step)
        check_decision(strategy, step.view, decision, _where(strategy, step))
        taken.append(step)
        decisions.append(decision)
        blocks.go_on(step.view, decision)
    report.findings["shapes and types"] = "as declared"
    report.findings["inputs"] = "are left as they were"
    _check_repeats(strategy, build(), taken, decisions)
    report.findings["repeated"] = "decides the same, bit for bit, whatever was before"
    _check_rows(strategy, taken, decisions, np.random.default_rng(seed))
    report.findings["rows"] = "decide alike alone, among others, permuted and padded"
    if compiling != "no":
        _check_compiled(strategy, taken, decisions, compiling, required, report)
    return report


def decide(strategy: Strategy, step: Step) -> Decision:
    """The strategy's decision, of which the inputs know nothing."""
    where = _where(strategy, step)
    before, numbers = _copy(step.view), dict(_copy(step.numbers))
    try:
        decision = strategy.select(step.view, step.numbers)
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        missing = ", ".join(sorted(NEEDS - strategy.needs))
        raise AssertionError(
            f"{where}: select fails: {type(error).__name__}: {error}. Statistics and "
            f"state are in the view only if they are declared: not in `needs` are "
            f"{missing or 'none'}; in `state` are {', '.join(strategy.state) or 'none'}"
        ) from error
    for name, after in ("view", step.view), ("row_params", step.numbers):
        changed = _difference(before if name == "view" else numbers, after)
        assert changed is None, (
            f"{where}: select has changed {name}: {changed}. Views are shared with "
            "other strategies and with the engine: make new tensors (`a & b`, "
            "torch.where, .clone()) instead of changing these (`a &= b`, `a[i] = b`, "
            ".copy_())"
        )
    return decision


# -- decisions that must be the same --------------------------------------


def _check_repeats(
    strategy: Strategy,
    other: Strategy,
    steps: Sequence[Step],
    decisions: Sequence[Decision],
) -> None:
    """The same object again, and another one that has seen other steps before."""
    for step, decision in reversed(list(zip(steps, decisions, strict=True))):
        where = _where(strategy, step)
        for seed in (1, 2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                again = decide(strategy, step)
            _assert_same(
                decision,
                again,
                f"{where}: deciding it once more",
                "A decision must follow from the view alone: draw from View.uniform "
                "(needs 'uniform'), not from torch's or Python's generators, and "
                "remember with `state`, not on self",
            )
        _assert_same(
            decision,
            decide(other, step),
            f"{where}: another object with the same parameters",
            "What is remembered on self belongs to no request: tensor-parallel workers "
            "have an object each. Declare it in `state`, return it in Decision.state",
        )


def _check_rows(
    strategy: Strategy,
    steps: Sequence[Step],
    decisions: Sequence[Decision],
    random: np.random.Generator,
) -> None:
    """Rows alone, among others, in another order, and with padding behind them."""
    for step, decision in zip(steps, decisions, strict=True):
        rows = len(step.view.step)
        order = random.permutation(rows)
        alone = [np.array([row]) for row in range(rows)]
        for chosen in (*alone, order, order[: rows // 2], order[rows // 2 :]):
            part = step.take(chosen)
            _assert_same(
                _rows_of(decision, chosen),
                decide(strategy, part),
                f"{_where(strategy, part)}: among {rows} rows and among these",
                "Each row is another request, decided by itself: reduce over dim=1 "
                "(positions), never over dim=0 or over all of a tensor, and compare "
                "numbers of the row, row_params['name'][:, None]",
            )
        some = np.sort(order[: rows // 2])
        part = step.take(some).padded(3)
        _assert_same(
            _rows_of(decision, some),
            _rows_of(decide(strategy, part), np.arange(len(some))),
            f"{_where(strategy, part)}: with rows of no request behind",
            "The engine fills batches up with rows in which nothing is valid or masked",
        )


def _check_compiled(
    strategy: Strategy,
    steps: Sequence[Step],
    decisions: Sequence[Decision],
    compiling: Compiling,
    required: bool,
    report: Report,
) -> None:
    """Whether one compiled function serves any number of rows, with the same bits."""
    reason = why_eager(strategy)
    found: list[Decision] = []
    parts = []
    if reason is None:
        rows = len(steps[0].view.step)
        # One function: the engine never calls it with a single row.
        for number in sorted({2, 3, rows}):
            chosen = np.arange(number)
            for step, decision in zip(steps, decisions, strict=True):
                parts.append((step.take(chosen), _rows_of(decision, chosen)))
        calls = [(step.view, step.numbers) for step, _ in parts]
        reason = compile_and_compare(strategy, calls, compiling == "run", found)
    report.traces = reason is None
    if reason is not None:
        report.findings["compiles"] = f"no, it runs eagerly: {reason}"
        assert not required, f"{strategy.name} cannot be compiled: {reason}"
        return
    for (step, decision), compiled in zip(parts, found, strict=True):
        _assert_same(
            decision,
            compiled,
            f"{_where(strategy, step)}: eager and compiled",
            "Compiled arithmetic may round otherwise (fused multiply-add, logarithms): "
            "compare statistics with parameters as they are, or in float64 rounded to "
            "float32 at the end",
        )
    report.findings["compiles"] = "yes, one graph for any number of rows"
    if compiling == "run":
        report.findings["compiled"] = "decides as eagerly, bit for bit"


# -- parameters ------------------------------------------------------------


def _vary(
    strategy_class: type[Strategy],
    given: Params,
    block_length: int,
    context: Context,
    rows: int,
    seed: int,
) -> list[Params]:
    """Parameters for each row: the first as given, the others near it where valid."""
    random = np.random.default_rng(seed)
    found = [given]
    names = numeric_fields(strategy_class.Params)
    # Rows by themselves: a value may be valid only together with another.
    for _ in range(200):
        if len(found) == rows or not names:
            break
        numbers: dict[str, float] = {}
        for name in names:
            value = getattr(given, name) * random.choice([1.0, 1.0, 0.5, 0.8, 1.25])
            # As the engine hands it on.
            is_int = strategy_class.Params.model_fields[name].annotation is int
            numbers[name] = round(value) if is_int else float(np.float32(value))
        try:
            one = strategy_class.Params(**(given.model_dump() | numbers))
            strategy_class.validate(one, block_length, context)
        except (ValidationError, ValueError):
            continue
        found.append(one)
    return (found * rows)[:rows]


def _numbers(
    strategy_class: type[Strategy], row_params: Sequence[Params]
) -> dict[str, torch.Tensor]:
    """name -> [R]: numeric parameters, as the engine gives them."""
    numbers = {}
    for name in numeric_fields(strategy_class.Params):
        is_int = strategy_class.Params.model_fields[name].annotation is int
        numbers[name] = torch.tensor(
            [getattr(one, name) for one in row_params],
            dtype=torch.int64 if is_int else torch.float32,
        )
    return numbers


# -- comparing -------------------------------------------------------------


def _where(strategy: Strategy, step: Step) -> str:
    return f"{strategy.name}, {step.name}"


def _parts(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and arrays of a view, a decision or a mapping, with their names."""
    if value is None:
        return
    if isinstance(value, torch.Tensor | np.ndarray):
        yield name, value
        return
    members = value
    if isinstance(value, Soft):
        members = value._asdict()
    elif not isinstance(value, Mapping):
        members = vars(value)
    if isinstance(value, Probabilities):
        members = {"rows": value.rows, "logsumexp": value.logsumexp}
    for key, member in members.items():
        yield from _parts(member, f"{name}.{key}" if name else key)


def _copy(value: Any) -> dict[str, Any]:
    return {
        name: part.clone() if isinstance(part, torch.Tensor) else part.copy()
        for name, part in _parts(value)
    }


def _difference(one: Any, other: Any) -> str | None:
    """What is not the same in two views, decisions or mappings; None if all is."""
    mine, theirs = dict(_parts(one)), dict(_parts(other))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            return f"{name} is set in one of them only"
        first, second = torch.as_tensor(mine[name]), torch.as_tensor(theirs[name])
        if first.shape != second.shape or first.dtype != second.dtype:
            kinds = [f"{one.dtype} {list(one.shape)}" for one in (first, second)]
            return f"{name} is {kinds[0]} and {kinds[1]}"
        unequal = (first != second).nonzero()
        if len(unequal):
            at = tuple(unequal[0].tolist())
            place = ", ".join(map(str, at))
            return f"{name}[{place}] is {first[at].item()} and {second[at].item()}"
    return None


def _assert_same(one: Decision, other: Decision, what: str, lesson: str) -> None:
    difference = _difference(one, other)
    assert difference is None, f"{what}: {difference}. {lesson}"


def _rows_of(decision: Decision, rows: np.ndarray) -> Decision:
    """Some rows [n] of a decision."""
    index = torch.from_numpy(rows)

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: pick(part) for name, part in value.items()}
        if isinstance(value, Soft):
            return Soft(*map(pick, value))
        return None if value is None else value[index]

    return replace(
        decision, **{name: pick(value) for name, value in vars(decision).items()}
    )
