# SPDX-License-Identifier: Apache-2.0
"""What the pump asks, counts and refuses; drivers of other packages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from search.table_model import TableModel, by_text, constant, ids, one, run, table
from search.test_all_searches import options_of

from vllm_dlm import search
from vllm_dlm.search.base import Task, Text
from vllm_dlm.search.jobs import draw_seed

COIN = {"": {"a": 0.5, "b": 0.5}}


class Twice(search.Driver):
    """Asks for the same completion two times, as a driver of another package."""

    name = "twice"
    summary = "ask twice"
    samples: int = 2

    def search(self, task: Task) -> Any:
        for _ in range(2):
            (pieces,) = yield search.Complete([task.start], 4, n=self.samples)
        return [task.candidate(task.add(task.start, piece)) for piece in pieces]


# What is asked ----------------------------------------------------------------------


def test_what_was_asked_is_known():
    model = TableModel(table(COIN))
    results = run(model, Twice, ["?", "?"])
    # Greedy, so all samples of equal prompts are one.
    assert len(model.asked) == 1
    assert [result.stats.requests for result in results] == [1, 0]
    assert [result.stats.generated for result in results] == [2, 0]
    assert [result.best.text for result in results] == ["a", "a"]


def test_draws_depend_on_what_they_are_draws_of():
    text = Text((1, 2), (3,))
    seeds = {
        draw_seed(0, 0, text, 0),
        draw_seed(1, 0, text, 0),
        draw_seed(0, 1, text, 0),
        draw_seed(0, 0, text, 1),
        draw_seed(0, 0, Text((1,), (2, 3)), 0),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_seed(0, 0, Text((1, 2), (3,), logprob=-1.0), 0) in seeds


def test_the_scorer_sees_everything_at_once():
    calls = []

    def scorer(candidates: Any) -> list[float]:
        calls.append([(each.index, each.prompt, each.record) for each in candidates])
        return [0.0] * len(candidates)

    prompts = [{"prompt": "?", "answer": "a"}, "b"]
    run(TableModel(table(COIN)), "best_of_n", prompts, scorer=scorer, n=2)
    assert calls == [
        [(0, "?", {"answer": "a"})] * 2 + [(1, "b", {})] * 2,
    ]


def test_results_are_told_as_they_come():
    told = []
    results = run(
        TableModel(table(COIN)),
        "best_of_n",
        ["?", "a"],
        on_result=lambda index, result: told.append((index, result.best.text)),
    )
    assert sorted(told) == [(i, each.best.text) for i, each in enumerate(results)]


def test_stop_strings_end_a_text():
    """Also one that two pieces share."""
    rows = {"": {"a": 1.0}, "a": {"b": 1.0}, "ab": {"c": 1.0}, "abc": {"d": 1.0}}
    model = TableModel(table(rows))
    model.stops = ("bc",)
    result = one(model, "best_of_n", n=1, temperature=0)
    assert result.best.text == "a" and result.best.state.finish_reason == "stop"
    result = one(
        model, "best_first", scorer=constant(0.5), k=1, temperature=0, step_tokens=2
    )
    assert result.best.text == "a" and result.best.token_ids == ids("abcd")
    result = one(model, "lookahead", tau=9.0)
    assert result.best.text == "a" and result.best.token_ids == ids("abc")


def test_no_prompts():
    assert run(TableModel(table(COIN)), "best_of_n", []) == []


# Budgets ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"tokens": 1}, "budget of 1 tokens is too small.*needs 40"),
        ({"requests": 7}, "budget of 7 requests is too small.*needs 8"),
        ({"tokens": 0}, "budget: tokens: .*greater than 0"),
        ({"seconds": 0}, "budget: seconds: .*greater than 0"),
        ({"seconds": math.nan}, "budget: seconds"),
        ({"scores": True}, "scores: expected a number"),
        ({"dollars": 3}, "unknown option 'dollars'.*tokens, requests, scores, seconds"),
        (3, "expected a dict of tokens"),
    ],
)
def test_budgets_that_are_refused(budget: Any, message: str):
    model = TableModel(table(COIN))
    with pytest.raises(ValueError, match=message):
        one(model, "best_of_n", max_tokens=5, budget=budget)


def test_a_budget_of_one_score():
    """The first roll-out is scored; what was found by then is returned."""
    model = TableModel(table(COIN))
    result = one(model, "mcts", scorer=by_text({"a": 0.2}), budget={"scores": 1})
    assert result.exhausted == "scores"
    assert result.best.text == "a" and result.best.score == 0.2
    assert result.stats.scores == 1


@pytest.mark.parametrize("name", search.SEARCHES.names())
def test_any_search_can_be_cut_short(name: str):
    rows = {before: {"a": 0.4, "b": 0.4, "$": 0.2} for before in ("", "a", "b", "ab")}
    options = options_of(name, constant(0.5))
    whole = one(TableModel(table(rows)), name, **options)
    for requests in range(1, whole.stats.requests + 1):
        budget = search.Budget(requests=requests)
        model = TableModel(table(rows))
        try:
            result = one(model, name, budget=budget, **options)
        except ValueError as error:
            assert "the first request of this search needs" in str(error)
            continue
        assert len(model.asked) <= requests
        is_cut = requests < whole.stats.requests
        assert (result.exhausted == "requests") == is_cut
        assert result.candidates


def test_a_limit_of_time():
    """Nothing goes on once it is over, and nothing is left in the engine."""
    model = TableModel(table(COIN), burst=1)
    results = run(model, "best_of_n", ["?", "a"], budget={"seconds": 1e-9})
    assert [result.exhausted for result in results] == ["seconds"] * 2
    assert model.waiting == [] and model.closed


# Bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("driver", "options", "message"),
    [
        ("best", {}, "unknown search 'best'; choose one of: best_first, best_of_n"),
        ("best_of_n", {"m": 3}, "unknown option 'm'.*seed, n, temperature"),
        ("best_of_n", {"n": 0}, "n: .*greater than or equal to 1"),
        ("best_of_n", {"n": True}, "n: expected a number"),
        ("best_of_n", {"temperature": 0}, "n 8 with temperature 0.*8 equal texts"),
        ("best_of_n", {"temperature": math.nan}, "temperature"),
        ("best_of_n", {"enough": 1}, "enough is a score"),
        ("best_of_n", {"scorer": 3}, "cannot be called"),
        ("mcts", {}, "'mcts' needs a scorer; without one work: best_of_n"),
        ("vote", {"scorer": constant(1)}, "asks no scorer.*best_first"),
        ("vote", {"hex": True}, "writes token by token"),
        ("vote", {"hex": True, "max_tokens": 100}, "no multiple"),
        ("vote", {"hex": True, "variants": [{}]}, "leave one of the two out"),
        ("vote", {"variants": []}, "variants"),
        ("vote", {"n": 3, "temperature": 0}, "3 equal texts"),
        ("lookahead", {}, "needs tau"),
        ("lookahead", {"tau": 1, "weight": 2}, "weight is an option of.*'transfer'"),
        ("lookahead", {"tau": 1, "k": 30}, "only the 20 likeliest"),
        ("lookahead", {"tau": 1, "scorer": constant(1)}, "adadec asks no scorer"),
        ("lookahead", {"method": "transfer"}, "transfer needs a scorer"),
        ("lookahead", {"method": "other"}, "method: .*'adadec' or 'transfer'"),
        ("lookahead", {"tau": 1, "top": 21}, "looks at 21 next tokens.*tells 20"),
        ("particles", {"n": 1}, "greater than or equal to 2"),
        ("particles", {"step_blocks": 1}, "step_blocks is for diffusion models"),
        ("particles", {"step_stop": ("",)}, "empty text"),
        ("mcts", {"scorer": constant(1), "policy": 3}, "policy"),
    ],
)
def test_options_that_are_refused(
    driver: str, options: Mapping[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        one(TableModel(table(COIN)), driver, **options)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([math.nan], "the score of prompt 0 is nan"),
        (["good"], "the score of prompt 0 is 'good', and no number"),
        ([None], "the score of prompt 0 is None"),
        ([1, 2], "a sequence of 1 numbers.*it returned 2"),
        (3.0, "a sequence of 1 numbers.*it returned 3.0"),
    ],
)
def test_scores_that_are_refused(scores: Any, message: str):
    model = TableModel(table(COIN))
    with pytest.raises(ValueError, match=message):
        one(model, "best_of_n", n=1, scorer=lambda candidates: scores)
    assert model.closed


def test_the_lowest_score():
    result = one(TableModel(table(COIN)), "best_of_n", scorer=constant(-math.inf))
    assert result.best.score == -math.inf


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_an_exception_of_the_scorer_comes_through(kind: type[BaseException]):
    model = TableModel(table(COIN))

    def scorer(candidates: Any) -> list[float]:
        raise kind("mine")

    with pytest.raises(kind, match="mine"):
        one(model, "best_of_n", scorer=scorer)
    assert model.waiting == [] and model.closed


def test_an_interrupted_engine_is_left_idle(monkeypatch: pytest.MonkeyPatch):
    model = TableModel(table(COIN), burst=1)
    poll = model.poll

    def interrupted() -> Any:
        if len(model.waiting) == 3:
            raise KeyboardInterrupt
        return poll()

    monkeypatch.setattr(model, "poll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one(model, "best_of_n")
    assert model.waiting == [] and model.closed


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 1 is empty"),
        ({"answer": "a"}, "prompt 1: .*holds no prompt: expected one of prompt"),
    ],
)
def test_prompts_that_are_refused(prompt: Any, message: str):
    with pytest.raises(ValueError, match=message):
        run(TableModel(table(COIN)), "best_of_n", ["?", prompt])


def test_what_cannot_be_searched_with():
    with pytest.raises(
        ValueError, match="cannot search with 3: expected a vllm_dlm.LLM"
    ):
        search.run(3, "best_of_n", ["?"])


def diffusion(model: TableModel) -> TableModel:
    model.kind = "full"
    return model


def test_next_tokens_of_a_diffusion_model():
    model = diffusion(TableModel(table(COIN)))
    with pytest.raises(
        ValueError, match="has none; take one of: best_first, best_of_n"
    ):
        one(model, "mcts", scorer=constant(0))


def test_models_with_other_tokenizers(monkeypatch: pytest.MonkeyPatch):
    other = TableModel(table(COIN))
    monkeypatch.setattr(other, "vocabulary", lambda: {"a": 3})
    with pytest.raises(ValueError, match="different tokenizers"):
        one(
            TableModel(table(COIN)),
            "lookahead",
            method="transfer",
            scorer=constant(0),
            continue_with=other,
        )


# Drivers of others ------------------------------------------------------------------


def test_a_package_adds_a_search(tmp_path, monkeypatch):
    """Through an entry point of an installed distribution."""
    (tmp_path / "finder.py").write_text(
        "from vllm_dlm.search import Branch, Driver\n"
        "class Greedy(Driver):\n"
        "    name, summary, branches = 'greedy', 'the likeliest token', True\n"
        "    most: int = 3\n"
        "    def search(self, task):\n"
        "        text = task.start\n"
        "        while not text.finished:\n"
        "            (((token, logprob), *_),) = yield Branch([text], 1)\n"
        "            text = task.write(text, token, logprob, self.most)\n"
        "        return [task.candidate(text)]\n"
    )
    installed = tmp_path / "finder-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: finder\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm_dlm.searches]\ngreedy = finder:Greedy\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(search.SEARCHES, "_scanned", False)
    monkeypatch.setattr(search.SEARCHES, "_targets", dict(search.SEARCHES._targets))
    rows = {"": {"a": 0.6, "b": 0.4}, "a": {"b": 1.0}, "ab": {"c": 1.0}}
    model = TableModel(table(rows))
    assert one(model, "greedy").best.text == "abc"
    assert one(model, "greedy", most=2).best.text == "ab"
    with pytest.raises(ValueError, match="unknown option 'n'.*seed, most"):
        one(model, "greedy", n=3)


def test_a_driver_that_returns_nothing():
    class Empty(search.Driver):
        name = "empty"
        summary = "nothing"

        def search(self, task: Task) -> Any:
            yield search.Score([])
            return []

    with pytest.raises(TypeError, match="prompt 0 returned .*at least one"):
        one(TableModel(table(COIN)), Empty)
