# SPDX-License-Identifier: Apache-2.0
"""Requests that both an engine and the oracle can decode, and their comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from engine.harness import Engine, Finished, params
from reference import (
    place_rules,
    procedures,
    rewriting_rules,
    rules,
    stateful_rules,
)
from reference.cached_procedures import ALL_CACHES
from reference.growing import Growing
from reference.llada import TinyLLaDA
from reference.procedures import Rule, View, generate
from reference.stateful_rules import remembering
from vllm import SamplingParams

from vllm_dlm.kernels.draw import uniform
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

REMEMBERING = {
    "bacd": stateful_rules.Bacd,
    "klass": stateful_rules.Klass,
    "credit": stateful_rules.Credit,
    "slowfast": stateful_rules.SlowFast,
}

EVENTFUL: dict[str, dict[str, Any]] = {
    "cad": {"threshold": 0.8, "most": 4},
    "bacd": {"lowest": 0.3, "highest": 0.7},
    "klass": {"threshold": 0.5, "kl_threshold": 0.3},
    "hierarchy": {"threshold": 0.9, "low_threshold": 0.4},
    "credit": {"threshold": 0.7},
    "slowfast": {"threshold": 0.6, "horizon_threshold": 0.5, "slow_steps": 3},
    "joint": {"mask_threshold": 0.3, "edit_threshold": 0.1, "max_post_steps": 3},
    "ete": {"threshold": 0.5, "window": 6, "fewest_bits": 2.0},
    "prophet": {"early": 1.8, "middle": 1.4, "late": 1.1, "span": 6},
    "multi_block": {"block": 6, "open_at": 0.3, "due_at": 0.6},
}
"""Parameters that a random model reaches; the oracle's have the same names."""

PENALTY = 2.0
"""Of `joint/penalty`."""

ANSWER = {"answer_start": 21, "answer_width": 3}
"""Where `prophet/answer` looks: in the second block or the third."""

EOTP = {"token": "first", "block": "block", "canvas": "canvas"}
"""Our names of end-of-text prediction and the oracle's."""

MULTI_BLOCK: dict[str, dict[str, Any]] = {
    "entropy": {"threshold": 2.0},
    "confidence": {"by": "confidence", "threshold": 0.4, "push": "each"},
    "stop": {"threshold": 2.0},
}
"""What the variants of `multi_block` are; "stop" ends at the first end of text."""

FILTER_BLOCKS = (8, 12, 16, 32)
"""Block lengths that have a Learn2PD filter."""

FREQUENCIES = torch.rand(100, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-5
FREQUENCIES /= FREQUENCIES.sum()
"""Of the first 100 token ids: the random checkpoints have more."""

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


def filter_weights(block: int) -> dict[str, torch.Tensor]:
    """A random Learn2PD filter, near the identity: some positions pass, some do not.

    Every position weighs on every other: a wrong or missing confidence shows.
    """
    generator = torch.Generator().manual_seed(block)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "w1": torch.eye(block) + 0.05 * noise(block, block),
        "b1": 0.05 * noise(block),
        "w2": 12 * torch.eye(block) + 0.3 * noise(block, block),
        "b2": -5.0 + 0.3 * noise(block),
    }


def write_filters(folder: Path) -> None:
    """Where an engine that serves `folder` finds them."""
    from vllm_dlm.strategies.learn2pd_filter import Filter

    for block in FILTER_BLOCKS:
        for cache in ALL_CACHES:
            name = f"learn2pd/b{block}-{cache}.safetensors"
            Filter(**filter_weights(block), cache=cache).save(folder / name)


def write_frequencies(folder: Path) -> None:
    """A table for `pc`, where an engine that serves `folder` finds it."""
    from vllm_dlm.strategies.token_frequencies import save_frequencies

    save_frequencies(folder / "pc" / "frequencies.safetensors", FREQUENCIES, {})


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


def case_rule(case: Case, begin: int, per_block: int, eos_id: int) -> Rule:
    """The oracle's rule for a canvas that begins after `begin` output tokens."""
    strategy, _, variant = case.rule.partition("/")
    if strategy == "threshold":
        return procedures.threshold(0.9 if case.number is None else case.number)
    if strategy == "factor":
        return procedures.factor(1.0 if case.number is None else case.number)
    if strategy == "entropy":
        return rules.entropy(0.5 if case.number is None else case.number)
    if strategy == "eb":
        return rules.entropy_bounded(0.1 if case.number is None else case.number)
    if strategy == "cad":
        return rules.cad(0.8 if variant == "confidence" else 0.3, 1, 4, variant)
    if strategy == "localleap":
        return place_rules.localleap()
    if strategy == "hierarchy":
        return place_rules.hierarchy(
            **EVENTFUL["hierarchy"], remask=variant == "remask"
        )
    if strategy == "pc":
        return place_rules.pc(FREQUENCIES)
    if strategy in REMEMBERING:
        options = dict(EVENTFUL[strategy])
        if strategy == "credit":
            options["parameter_free"] = variant == "parameter_free"
        rule = remembering(partial(REMEMBERING[strategy], **options))
        # KLASS's loop counts its steps out.
        return rule._replace(ends_by_schedule=strategy == "klass")
    if strategy == "joint":
        if variant != "plain":
            penalty = PENALTY if variant == "penalty" else 0.0
            return rewriting_rules.joint(**EVENTFUL["joint"], penalty=penalty)
        return rules.threshold(EVENTFUL["joint"]["mask_threshold"], strict=True)
    if strategy == "saber":
        return rewriting_rules.saber()
    if strategy == "ass":
        return rewriting_rules.ass()
    if strategy == "eoser":
        eos_ids = () if case.ignore_eos else (eos_id,)
        first_weight = 0.4 if variant == "even" else 0.01
        return rewriting_rules.eoser(eos_ids, variant, first_weight)
    if strategy == "ete":
        return rewriting_rules.ete(**EVENTFUL["ete"], begin=begin)
    if strategy == "prophet":
        answer = ANSWER if variant == "answer" else {}
        eos_ids = () if case.ignore_eos else (eos_id,)
        more = {**EVENTFUL["prophet"], **answer, "begin": begin, "eos_ids": eos_ids}
        return rules.prophet(case.block, **more)
    if strategy == "multi_block":
        return place_rules.multi_block(**EVENTFUL[strategy], **MULTI_BLOCK[variant])
    if strategy == "learn2pd":
        return procedures.learn2pd(
            **filter_weights(case.block), k=max(case.block // per_block, 1)
        )
    if variant != "random":
        return procedures.static(variant)
    first = len(case.prompt) + begin

    def engine_noise(forward: int, position: int) -> float:
        # The engine's own numbers; a block takes `per_block` forwards, no more.
        key = (case.seed, first + position, forward % per_block)
        return float(uniform(*(torch.tensor(number) for number in key)))

    return procedures.static("random", engine_noise)


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
