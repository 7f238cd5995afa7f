# SPDX-License-Identifier: Apache-2.0
"""Requests that both an engine and the oracle can decode, and their comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from engine.case_rules import ANSWER, EVENTFUL, MULTI_BLOCK, PENALTY, case_rule
from engine.harness import Engine, Finished, params
from reference import procedures
from reference.growing import Growing
from reference.llada import TinyLLaDA
from reference.procedures import Rule, View, generate
from vllm import SamplingParams

from vllm_dlm.strategies import STRATEGIES

RULES = (
    *(f"static/{mode}" for mode in procedures.STATIC_MODES),
    "threshold",
    "threshold/token",
    "threshold/canvas",
    "factor",
    "learn2pd/off",
    "learn2pd/token",
    "learn2pd/block",
    "entropy",
    "eb",
    "cad/confidence",
    "cad/entropy",
    "localleap",
    "localleap/block",
    "hierarchy",
    "hierarchy/remask",
    "pc",
    "prophet/masks",
    "prophet/answer",
    "bacd",
    "klass",
    "credit/fixed",
    "credit/parameter_free",
    "slowfast",
    "joint/edit",
    "joint/penalty",
    "joint/plain",
    "saber",
    "ass",
    "eoser/even",
    "eoser/doubling",
    "ete",
    "multi_block/entropy",
    "multi_block/confidence",
    "multi_block/stop",
)
"""strategy or strategy/variant."""

NUMBERS = {
    "threshold": "threshold",
    "factor": "factor",
    "learn2pd": "eotp_threshold",
    "entropy": "threshold",
    "eb": "bound",
}
"""The parameter that `Case.number` sets, by strategy."""

EOTP = {"token": "first", "block": "block", "canvas": "canvas"}
"""Our names of end-of-text prediction and the oracle's."""

WHOLE_BLOCK = ("learn2pd", "hierarchy", "joint", "saber", "prophet")
"""Strategies that read decided positions too."""

MASK_ID = 120
"""Of the random checkpoints."""

TIE = 1e-5
"""Scores closer than this may be ordered either way by two float32 programs."""


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: tuple[int, ...]
    rule: str = "static/low_confidence"
    cache: str = "none"
    block: int = 16
    max_tokens: int = 32
    steps: int | None = None
    ignore_eos: bool = False
    seed: int = 0
    number: float | None = None
    """The rule's parameter of `NUMBERS`, where not the usual value."""
    cache_config: dict[str, Any] = field(default_factory=dict)
    growing: Growing | None = None
    canvas: tuple[int | None, ...] | None = None
    """What the request writes itself, of `max_tokens` positions; None in holes."""

    @property
    def sure(self) -> float:
        """The option `eotp_threshold`; a random model is never sure of an end."""
        strategy, _, variant = self.rule.partition("/")
        if strategy == "learn2pd" and self.number is not None:
            return self.number
        return 0.05 if variant == "canvas" else 0.9

    def params(self, reference_exact: bool = False, **more: Any) -> SamplingParams:
        strategy, _, variant = self.rule.partition("/")
        config = dict(EVENTFUL.get(strategy, {}))
        if strategy in ("static", "cad", "credit"):
            config["mode"] = variant
        elif strategy == "eoser":
            config["schedule"] = variant
        elif strategy == "joint":
            config["edit"] = variant != "plain"
            if variant == "penalty":
                config["penalty"] = PENALTY
        elif variant == "remask":
            config["remask"] = True
        elif variant == "answer":
            config |= ANSWER
        elif strategy == "multi_block":
            config |= MULTI_BLOCK[variant] | {"cut_at_end": variant == "stop"}
        if self.number is not None and strategy != "learn2pd":
            config[NUMBERS[strategy]] = self.number
        dlm = {
            "strategy": strategy,
            "strategy_config": config,
            "cache": self.cache,
            "cache_config": self.cache_config,
            "block_length": self.block,
            "steps": self.steps if follows_schedule(strategy, config) else None,
            "eotp": variant if variant in EOTP else "off",
            "eotp_threshold": self.sure if variant in EOTP else None,
            "reference_exact": reference_exact,
        }
        if self.canvas is not None:
            ids = [MASK_ID if token is None else token for token in self.canvas]
            dlm["canvas"] = ids
        if self.growing is not None:
            growth = asdict(self.growing)
            dlm["growth"] = growth.pop("rule")
            if dlm["growth"] != "daedal":
                del growth["window"]
            dlm["growth_config"] = growth
        options = {"ignore_eos": self.ignore_eos, "seed": self.seed} | more
        return params(self.max_tokens, dlm=dlm, **options)


def follows_schedule(strategy: str, config: dict[str, Any]) -> bool:
    """Whether a request may set steps: the oracle's other rules do not read them."""
    kind = STRATEGIES[strategy]
    return kind.follows_schedule(kind.Params(**config))


@dataclass(frozen=True)
class Expected:
    """What the oracle says a request's tokens and forwards are."""

    tokens: list[int]
    forwards: int
    written_at: list[int]
    """Forward, from 0, that wrote each token; -1 where it is a mask left over."""
    look_for_ties: Callable[[], bool] = field(compare=False, repr=False)

    @cached_property
    def near_tie(self) -> bool:
        """Whether a decision on the way was closer than float32 programs agree."""
        return self.look_for_ties()


def expect(
    case: Case,
    model: TinyLLaDA,
    *,
    max_canvas: int = 256,
    observe: Callable[[View, list[int]], None] | None = None,
    watch: Callable[[Rule, View, list[int]], None] | None = None,
    **options: Any,
) -> Expected:
    """Decode a case with the oracle, canvas after canvas."""
    _, _, variant = case.rule.partition("/")
    blocks_at_most = max(max_canvas // case.block, 1)
    blocks = min(-(-case.max_tokens // case.block), blocks_at_most)
    per_block = case.block
    if case.steps is not None:
        per_block = min(max(case.steps // blocks, 1), case.block)
    eotp, eot_threshold = EOTP.get(variant), case.sure
    if variant == "stop":  # behind what is written, not behind what is predicted
        eotp, eot_threshold = "first", 2.0
    tokens: list[int] = []
    written_at: list[int] = []
    forwards = 0
    while len(tokens) < case.max_tokens:
        left = case.max_tokens - len(tokens)
        blocks = min(-(-left // case.block), blocks_at_most)
        rule = case_rule(case, len(tokens), per_block, model.eos_id)
        if watch is not None:
            observe = partial(watch, rule)
        written = "written" if case.cache_config.get("early_stop") else None
        result = generate(
            model,
            [*case.prompt, *tokens],
            gen_length=len(case.canvas) if case.canvas else blocks * case.block,
            canvas=case.canvas,
            block_length=case.block,
            steps=per_block * blocks,
            rule=rule,
            cache=case.cache,
            # Only a request's first block warms up, not that of a further canvas.
            cache_options=case.cache_config | ({"warmup_steps": 0} if tokens else {}),
            whole_block=case.rule.partition("/")[0] in WHOLE_BLOCK,
            eos_stop=not case.ignore_eos,
            # Who ignores the end of the text has none to predict.
            eotp=None if case.ignore_eos else eotp or written,
            eot_threshold=eot_threshold,
            growing=case.growing,
            observe=observe,
            **options,
        )
        kept = result.tokens[:left]
        tokens += kept
        steps = result.step_of_position[: len(kept)]
        written_at += [-1 if step < 0 else forwards + step for step in steps]
        # The reference denoises whole blocks; the engine stops as soon as the tokens
        # that are wanted are final.
        forwards += max(steps) + 1
        if not case.ignore_eos and model.eos_id in kept:
            break
        if len(tokens) % case.block:  # a canvas cut inside a block is the last
            break

    def look_for_ties() -> bool:
        found = []

        def look(rule: Rule, view: View, chosen: list[int]) -> None:
            found.append(is_near_tie(rule, view, chosen))

        expect(case, model, max_canvas=max_canvas, watch=look, **options)
        return any(found)

    return Expected(tokens, forwards, written_at, look_for_ties)


def is_near_tie(rule: Rule, view: View, chosen: list[int]) -> bool:
    """Whether changes smaller than `TIE` would turn a decision or a token."""
    looked_at = list(chosen)
    if rule.rewrites:
        looked_at += [i for i in range(len(view.decided)) if view.decided[i]]
    if looked_at and float(view.margin[looked_at].min()) < TIE:
        return True
    if len(view.masked) == 1:  # nothing to choose; a seed is decided by no rule
        return False
    generator = torch.Generator().manual_seed(0)
    for _ in range(16):
        signs = torch.randint(2, view.masked.shape, generator=generator)
        noise = TIE * (2 * signs - 1)
        moved = replace(
            view,
            confidence=view.confidence + noise,
            margin=view.margin + noise,
            entropy=view.entropy + noise,
        )
        after = rule.step(moved)
        if sorted(after.commit) != sorted(chosen):
            return True
        if rule.rewrites and after[1:] != rule.step(view)[1:]:
            return True
    return False


def run_cases(engine: Engine, cases: Sequence[Case], **more: Any) -> list[Finished]:
    return engine.run(
        [case.prompt for case in cases],
        [case.params(**more) for case in cases],
    )


def assert_equal(
    cases: Sequence[Any],
    got: Sequence[Finished],
    wanted: Sequence[Any],
    near_ties: int | None = None,
) -> None:
    """Tokens and forwards of every case; near-ties may differ, but not many.

    Args:
        wanted: of each case its `tokens`, `forwards`, and whether it is a `near_tie`.
        near_ties: how many may differ; one in a hundred by default.
    """
    wrong = [
        (case, result, expected)
        for case, result, expected in zip(cases, got, wanted, strict=True)
        if (result.tokens, result.forwards) != (expected.tokens, expected.forwards)
    ]
    real = [entry for entry in wrong if not entry[2].near_tie]
    assert not real, f"{len(real)} of {len(cases)} differ, first: {real[0]}"
    most = len(cases) // 100 if near_ties is None else near_ties
    assert len(wrong) <= most, f"too many near-ties: {len(wrong)}"


def assert_same_tokens(got: Sequence[Sequence[int]], wanted: Sequence[Any]) -> None:
    """Tokens are the oracle's, but for near-ties; forwards are not compared."""
    wrong = [
        (number, tokens, expected.tokens)
        for number, (tokens, expected) in enumerate(zip(got, wanted, strict=True))
        if list(tokens) != expected.tokens and not expected.near_tie
    ]
    assert not wrong, f"{len(wrong)} of {len(wanted)} differ, first: {wrong[0]}"


def make_prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Ordinary words: no special token of the random checkpoints."""
    source = random.Random(f"{length}:{seed}")
    return tuple(source.randrange(110) for _ in range(length))
