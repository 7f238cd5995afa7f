# SPDX-License-Identifier: Apache-2.0
"""Which strategies and options a pattern can be combined with."""

from __future__ import annotations

from typing import Any

from vllm_dlm.config.constraints import constrained_strategies, why_unconstrained
from vllm_dlm.config.model import NO_MASK, ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve

FULL = ModelDefaults("threshold", 32, mask_token_id=9)


def why(**asked: Any) -> str | None:
    return why_unconstrained(resolve(DlmConfig(), {"dlm": asked}, FULL))


def test_what_moves_tokens_is_refused():
    assert "levenshtein" not in constrained_strategies()


def test_what_writes_candidates_is_not():
    for strategy in ("threshold", "saber", "eb", "klass", "prophet", "credit", "joint"):
        assert why(strategy=strategy) is None
    assert {"linear_spec", "lopa", "freedave"} < {*constrained_strategies()}


def test_the_reason_names_strategies_that_can():
    options = {"strategy": "freedave", "strategy_config": {"eager": True}}
    blocks = ModelDefaults("threshold", 4, mask_token_id=9, attention="block")
    refused = why_unconstrained(resolve(DlmConfig(), {"dlm": options}, blocks))
    assert refused is not None
    assert "'freedave'" in refused and "threshold" in refused


def test_random_tokens_have_a_strategy_that_can():
    gemma = ModelDefaults(
        "renoise", 16, mask_token_id=NO_MASK, attention="causal", noise="uniform"
    )
    assert why_unconstrained(resolve(DlmConfig(), None, gemma)) is None
    assert constrained_strategies("uniform") == ["renoise"]
    assert "renoise" not in constrained_strategies()


def test_published_loops_are_refused():
    refused = why(reference_exact=True)
    assert refused is not None and "reference_exact" in refused
