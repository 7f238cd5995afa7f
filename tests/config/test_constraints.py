# SPDX-License-Identifier: Apache-2.0
"""Which strategies and options a pattern can be combined with."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_dlm.config.constraints import constrained_strategies, why_unconstrained
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve

FULL = ModelDefaults("threshold", 32, mask_token_id=9)


def why(**asked: Any) -> str | None:
    return why_unconstrained(resolve(DlmConfig(), {"dlm": asked}, FULL))


@pytest.mark.parametrize("strategy", ["freedave", "levenshtein", "lopa"])
def test_what_writes_other_tokens_is_refused_by_name(strategy: str):
    assert strategy not in constrained_strategies()


@pytest.mark.parametrize(
    "strategy", ["threshold", "saber", "eb", "klass", "prophet", "credit", "joint"]
)
def test_what_writes_candidates_is_not(strategy: str):
    assert why(strategy=strategy) is None


def test_the_reason_names_strategies_that_can():
    refused = why(strategy="lopa")
    assert refused is not None
    assert "'lopa'" in refused and "threshold" in refused


def test_published_loops_are_refused():
    refused = why(reference_exact=True)
    assert refused is not None and "reference_exact" in refused
