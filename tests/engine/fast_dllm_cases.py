# SPDX-License-Identifier: Apache-2.0
"""Requests that Fast-dLLM's own loops decode, by the engine and by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine import cases
from engine.cases import is_near_tie
from engine.harness import Engine, Finished, params
from engine.test_counts import counting
from reference.fast_dllm_procedures import CachedResult
from reference.rules import Rule, dream, factor, static, threshold

RULES: dict[str, tuple[str, dict[str, Any], Callable[[], Rule]]] = {
    "dream": ("dream", {}, dream),
    "dream/maskgit_plus": (
        "dream",
        {"alg": "maskgit_plus"},
        lambda: dream("maskgit_plus"),
    ),
    "dream/topk_margin": (
        "dream",
        {"alg": "topk_margin", "eps": 0.2},
        lambda: dream("topk_margin", 0.2),
    ),
    "threshold": ("threshold", {"threshold": 0.5}, lambda: threshold(0.5)),
    "threshold/strict": (
        "threshold",
        {"threshold": 0.4, "strict": True, "at_least": "best"},
        lambda: threshold(0.4, strict=True),
    ),
    "threshold/one": ("threshold", {"threshold": 1.5}, lambda: threshold(1.5)),
    "static": ("static", {}, static),
    "factor": ("factor", {"factor": 1.0}, lambda: factor(1.0)),
}
"""name -> strategy, its parameters, the oracle's rule."""


@dataclass(frozen=True)
class Loop:
    """One request, and how long its canvas and blocks are."""

    prompt: tuple[int, ...]
    max_tokens: int
    rule: str
    cache: str = "dual"
    block: int = 8
    steps: int | None = None
    """Of a block."""
    mask: bool = False
    """The mask id may be predicted."""
    ignore_eos: bool = True

    def params(self, mask_id: int, *, drawn: dict[str, Any] | None = None, **more: Any):
        """Its sampling parameters.

        Args:
            drawn: temperature and the like.
            more: options of ours.
        """
        strategy, config, _ = RULES[self.rule]
        dlm = {"strategy": strategy, "strategy_config": config, "cache": self.cache}
        ban = {} if self.mask else {"logit_bias": {mask_id: -100.0}}
        return params(
            self.max_tokens,
            dlm=dlm | {"steps_per_block": self.steps} | more,
            ignore_eos=self.ignore_eos,
            **ban,
            **(drawn or {}),
        )


class Wanted(CachedResult):
    """The oracle's result up to the last token that is wanted."""

    near_tie: bool = False

    @classmethod
    def of(cls, decode: Callable[..., CachedResult], case: Loop) -> Wanted:
        rule = RULES[case.rule][2]()
        ties: list[bool] = []
        result = decode(
            rule=rule,
            observe=lambda *step: ties.append(is_near_tie(rule, *step)),
        )
        steps = result.step_of_position[: case.max_tokens]
        forwards = result.forwards if -1 in steps else max(steps) + 1
        wanted = cls(
            result.tokens[: case.max_tokens], forwards, steps, result.rows[:forwards]
        )
        wanted.near_tie = any(ties)
        return wanted


def assert_equal(
    loops: Sequence[Loop], got: Sequence[Finished], wanted: Sequence[Wanted]
) -> None:
    """As `cases.assert_equal`; near-ties are more frequent here."""
    cases.assert_equal(loops, got, wanted, near_ties=1 + len(loops) // 50)


def rows_of(engine: Engine, case: Loop, **options: Any) -> list[int]:
    """Rows of every forward of a request alone."""
    with counting(engine) as counts:
        run(engine, [case], **options)
    return counts.rows


def run(engine: Engine, cases: Sequence[Loop], **options: Any) -> list[Finished]:
    mask_id = engine.scheduler.dlm_defaults.mask_token_id
    return engine.run(
        [case.prompt for case in cases],
        [case.params(mask_id, **options) for case in cases],
    )


def step_by_step(
    engine: Engine, prompt: Sequence[int], sampling: Any, preempt_after: int = -1
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Tokens; of every forward its rows, and before it the block and its step."""
    engine.add(prompt, sampling)
    (request,) = engine.scheduler.requests.values()
    tokens: list[int] = []
    places: list[tuple[int, int]] = []
    with counting(engine) as counts:
        while engine.busy:
            if len(places) == preempt_after:
                engine.preempt(request.request_id)
            places.append((request.block_start, request.step))
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
    return tokens, counts.rows, places
