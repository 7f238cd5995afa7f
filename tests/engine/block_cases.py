# SPDX-License-Identifier: Apache-2.0
"""Requests for models that reuse blocks, decoded by the engine and by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.cases import Expected, follows_schedule, is_near_tie
from engine.harness import Engine, Finished, params
from reference.block_procedures import generate_blocks
from reference.network import TinyModel
from reference.rewriting_rules import joint
from reference.rules import Rule, View, factor, static, threshold
from vllm import SamplingParams

from vllm_dlm.config.model import as_ids

RULES: dict[str, tuple[str, dict[str, Any], Callable[[], Rule]]] = {
    "static": ("static", {}, static),
    "sequential": (
        "static",
        {"mode": "left_to_right"},
        lambda: static("left_to_right"),
    ),
    "entropy": ("static", {"mode": "entropy"}, lambda: static("entropy")),
    "dynamic": (
        "threshold",
        {"threshold": 0.6, "strict": True, "at_least": "scheduled"},
        lambda: threshold(0.6, strict=True, at_least="scheduled"),
    ),
    "threshold": (
        "threshold",
        {"threshold": 0.5, "strict": False, "at_least": "best"},
        lambda: threshold(0.5),
    ),
    "factor": ("factor", {"factor": 1.0}, lambda: factor(1.0)),
    "joint": (
        "joint",
        {"mask_threshold": 0.3, "edit_threshold": 0.1, "max_post_steps": 3},
        lambda: joint(0.3, 0.1, 3),
    ),
    "joint/penalty": (
        "joint",
        {"mask_threshold": 0.3, "edit_threshold": 0.1, "max_post_steps": 3}
        | {"penalty": 2.0},
        lambda: joint(0.3, 0.1, 3, 2.0),
    ),
}
"""name -> strategy, its parameters, the oracle's rule."""


@dataclass(frozen=True)
class BlockCase:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    rule: str = "threshold"
    steps_per_block: int | None = None
    ignore_eos: bool = False
    canvas: tuple[int | None, ...] | None = None
    """What the request writes itself, of `max_tokens` positions; None in holes."""
    mask_id: int | None = None
    """The model's, with a canvas."""

    def params(self, **more: Any) -> SamplingParams:
        strategy, config, _ = RULES[self.rule]
        dlm = {
            "strategy": strategy,
            "strategy_config": config,
        }
        if follows_schedule(strategy, config):
            dlm["steps_per_block"] = self.steps_per_block
        if self.canvas is not None:
            ids = [self.mask_id if token is None else token for token in self.canvas]
            dlm["canvas"] = ids
        return params(self.max_tokens, dlm=dlm, ignore_eos=self.ignore_eos, **more)


def expect(case: BlockCase, model: TinyModel, engine: Engine) -> Expected:
    """What the oracle says, of a model as `engine` serves it."""
    scheduler = engine.scheduler
    model_defaults = scheduler.dlm_defaults
    block = scheduler.dlm_server.block_length or model_defaults.block_length
    hf_config = scheduler.vllm_config.model_config.hf_config
    _, _, make_rule = RULES[case.rule]

    def decode(watch: Callable[[Rule, View, list[int]], None] | None = None):
        rule = make_rule()
        return generate_blocks(
            model,
            list(case.prompt),
            max_tokens=case.max_tokens,
            block_length=block,
            rule=rule,
            steps_per_block=case.steps_per_block,
            origin=model_defaults.block_origin,
            context="causal" if model_defaults.attention == "causal" else "blocks",
            shift=model_defaults.shift,
            seeds=model_defaults.leads_blocks,
            sub_block_length=model_defaults.sub_block_length,
            schedule=model_defaults.schedule,
            max_model_len=scheduler.max_model_len,
            eos_stop=not case.ignore_eos,
            canvas=case.canvas,
            pad_ids=as_ids(getattr(hf_config, "pad_token_id", None)),
            observe=None if watch is None else partial(watch, rule),
        )

    def look_for_ties() -> bool:
        found: list[bool] = []
        decode(lambda *step: found.append(is_near_tie(*step)))
        return any(found)

    result = decode()
    return Expected(
        result.tokens, result.forwards, result.step_of_position, look_for_ties
    )


def run(engine: Engine, cases: Sequence[BlockCase]) -> list[Finished]:
    return engine.run(
        [case.prompt for case in cases], [case.params() for case in cases]
    )
