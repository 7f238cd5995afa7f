# SPDX-License-Identifier: Apache-2.0
"""The oracle's rule of a request, with parameters that a random model reaches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from engine.model_files import FREQUENCIES, filter_weights
from reference import (
    place_rules,
    procedures,
    rewriting_rules,
    rules,
    stateful_rules,
)
from reference.procedures import Rule
from reference.stateful_rules import remembering

from vllm_dlm.kernels.draw import uniform

if TYPE_CHECKING:
    from engine.cases import Case

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

MULTI_BLOCK: dict[str, dict[str, Any]] = {
    "entropy": {"threshold": 2.0},
    "confidence": {"by": "confidence", "threshold": 0.4, "push": "each"},
    "stop": {"threshold": 2.0},
}
"""What the variants of `multi_block` are; "stop" ends at the first end of text."""


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
