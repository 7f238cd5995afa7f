# SPDX-License-Identifier: Apache-2.0
"""What holds for every search: texts that can be written, alone as together, seeds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search.table_model import END, TableModel, constant, one, run, table

from vllm_dlm import search
from vllm_dlm.search.base import Candidate

SEARCHES: dict[str, dict[str, Any]] = {
    "best_first": {"step_tokens": 1, "expansions": 6},
    "best_of_n": {},
    "lookahead": {"method": "transfer", "k": 3, "horizon": 2},
    "mcts": {},
    "particles": {"step_tokens": 2},
    "vote": {},
}


def options_of(name: str, scorer: Any) -> dict[str, Any]:
    options = {"max_tokens": 5, **SEARCHES[name]}
    if search.SEARCHES[name].scorer != "unused":
        options["scorer"] = scorer
    return options


def test_every_search_is_tried():
    assert set(SEARCHES) == set(search.SEARCHES)


@st.composite
def tables(draw: Any) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for before in ("", "a", "b", "aa", "ab", "ba", "bb", "aab"):
        weights = [draw(st.integers(1, 9)) for _ in "ab$"]
        rows[before] = {
            letter: weight / sum(weights)
            for letter, weight in zip("ab$", weights, strict=True)
        }
    return rows


@pytest.mark.parametrize("name", SEARCHES)
@given(rows=tables())
def test_what_is_found_can_be_written(name: str, rows: dict[str, dict[str, float]]):
    model = TableModel(table(rows))
    result = one(model, name, **options_of(name, constant(0.5)))
    for candidate in result.candidates:
        written = candidate.token_ids
        assert candidate.finished and 1 <= len(written) <= 5
        assert written[-1] == END or len(written) == 5
        logprob = sum(
            math.log(model.probabilities(written[:i])[written[i]])
            for i in range(len(written))
        )
        assert candidate.state.logprob == pytest.approx(logprob)


@pytest.mark.parametrize("name", SEARCHES)
def test_alone_and_together_alike(name: str):
    """Also where pieces come back one at a time, the last asked for first."""
    rows = {before: {"a": 0.4, "b": 0.4, "$": 0.2} for before in ("", "a", "b", "ab")}
    prompts = ["?", "a", "ab"]

    def scorer(candidates: list[Candidate]) -> list[float]:
        return [0.5 + 0.1 * each.text.count("b") for each in candidates]

    def texts(results: Any) -> Any:
        return [[(c.text, c.score) for c in result.candidates] for result in results]

    options = options_of(name, scorer)
    together = run(TableModel(table(rows)), name, prompts, **options)
    trickling = run(TableModel(table(rows), burst=1), name, prompts, **options)
    assert texts(trickling) == texts(together)
    # The prompt's number is a part of a draw's seed, so the others stand before it.
    first = run(TableModel(table(rows)), name, prompts[:1], **options)
    assert texts(first) == texts(together)[:1]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_is_another_search(name: str):
    rows = {before: {"a": 0.4, "b": 0.4, "$": 0.2} for before in ("", "a", "b", "ab")}
    options = options_of(name, constant(0.5))
    draws = {}
    for seed in (1, 2, 1):
        model = TableModel(table(rows))
        found = one(model, name, seed=seed, **options).candidates
        seeds = {job.seed for job in model.asked}
        key = [each.text for each in found], seeds
        assert draws.setdefault(seed, key) == key
