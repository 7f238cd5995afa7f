# SPDX-License-Identifier: Apache-2.0
"""Published thresholds of multi-block decoding, by system, model and task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dlm.strategies.presets import Preset

D3LLM = "hao-ai-lab/d3LLM, eval_scripts"
D2F = "zhijie-group/Discrete-Diffusion-Forcing, D2F-eval"
ON_32 = "blocks of 32"


def _d3llm(threshold: float, beside: str = ON_32, **others: Any) -> Preset:
    values = {"threshold": threshold, "open_at": 0.1, "due_at": 0.95, **others}
    return Preset(values, D3LLM, beside)


def _d2f(block: int, open_at: float, threshold: float = 0.9) -> Preset:
    values = {
        "block": block,
        "by": "confidence",
        "threshold": threshold,
        "open_at": open_at,
        "due_at": 0.95,
        "push": "each",
    }
    return Preset(values, D2F)


PRESETS: Mapping[str, Preset] = {
    "d3llm_llada": _d3llm(0.5),
    "d3llm_llada_mbpp": _d3llm(0.4),
    "d3llm_llada_humaneval": Preset(
        {"threshold": 0.5, "open_at": 1.0, "due_at": 1.0}, D3LLM, ON_32
    ),
    "d3llm_dream": _d3llm(0.4),
    "d3llm_dream_humaneval": _d3llm(0.5, ON_32 + ", temperature 0.1"),
    "d3llm_coder": _d3llm(0.5),
    "d2f_llada_gsm8k": _d2f(64, 0.7),
    "d2f_llada_mbpp": _d2f(32, 0.9),
    "d2f_llada_math": _d2f(32, 0.1),
    "d2f_llada_humaneval": _d2f(32, 0.1),
    "d2f_dream_gsm8k": _d2f(32, 0.1),
    "d2f_dream_mbpp": _d2f(48, 0.1),
    "d2f_dream_math": _d2f(64, 0.1),
    "d2f_dream_humaneval": _d2f(32, 0.9, 0.95),
}
"""d3LLM's for LLaDA on MATH and GSM8K are the strategy's defaults."""
