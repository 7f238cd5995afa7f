# SPDX-License-Identifier: Apache-2.0
"""Every driver on worked examples, with tables of probabilities instead of models."""

from __future__ import annotations

import math
from typing import Any

import pytest
from search.table_model import END, TableModel, by_text, constant, ids, one, table

from vllm_dlm.search.base import Candidate, Text
from vllm_dlm.search.best_first import Frontier
from vllm_dlm.search.lookahead import entropy
from vllm_dlm.search.mcts import Child, Node, ProbabilityGuided, ValueGuided
from vllm_dlm.search.particles import effective, normalised, resample
from vllm_dlm.search.threshold import learn_threshold, read_entropies
from vllm_dlm.search.vote import Vote, count_votes

# best_of_n ------------------------------------------------------------------------


def test_the_best_score_then_the_likelier():
    model = TableModel(table({"": {"a": 0.5, "b": 0.2, "c": 0.3}}))
    result = one(model, "best_of_n", scorer=by_text({"b": 0.9, "c": 0.9}), n=40)
    assert result.best.text == "c" and result.best.score == 0.9
    assert [each.text for each in result.candidates].count("a") > 0
    assert [each.score for each in result.candidates] == sorted(
        (each.score for each in result.candidates), reverse=True
    )
    assert result.stats.scores == result.stats.requests == 40


def test_without_a_scorer_the_surest_answer():
    model = TableModel(table({"": {"a": 0.5, "b": 0.2, "c": 0.3}}))
    result = one(model, "best_of_n", n=20)
    assert result.best.text == "a"
    # Over two tokens, the one that ends the text included.
    assert result.best.score == pytest.approx(math.log(0.5) / 2)
    assert result.stats.scores == 0


def test_enough_ends_the_draws():
    model = TableModel(table({"": {"a": 1.0}}))
    result = one(model, "best_of_n", scorer=by_text({"a": 1.0}), n=10, enough=1)
    assert len(result.candidates) == 3
    result = one(model, "best_of_n", scorer=by_text({}), n=10, enough=1)
    assert len(result.candidates) == 10


# vote -----------------------------------------------------------------------------


def voters(*answers: tuple[str | None, float]) -> list[Candidate]:
    return [
        Candidate("?", 0, Text((1,), (2,), logprob=logprob), str(answer))
        for answer, logprob in answers
    ]


def test_ties_go_to_the_likelier_voters():
    found = count_votes(
        voters(("A", -1), ("B", -2), ("None", 0), ("B", -0.4), ("A", -0.9)),
        key=lambda text: None if text == "None" else text,
    )
    assert [(each.text, each.score) for each in found] == [
        ("A", 2),
        ("B", 2),
        ("None", 0),
    ]
    # The likeliest of the winner's voters.
    assert found[0].state.logprob == -0.9


def test_nobody_votes():
    found = count_votes(voters(("A", -1), ("B", -0.5)), key=lambda text: None)
    assert found[0].text == "B" and found[0].origin["votes"] == 0


def test_the_most_frequent_answer():
    model = TableModel(table({"": {"a": 0.6, "b": 0.4}}))
    result = one(model, "vote", n=60)
    assert result.best.text == "a"
    assert [each.origin["votes"] for each in result.candidates] == sorted(
        (each.origin["votes"] for each in result.candidates), reverse=True
    )
    assert sum(each.origin["votes"] for each in result.candidates) == 60


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (128, [4, 8, 16, 32, 64]),
        (256, [8, 16, 32, 64, 128]),
        (512, [16, 32, 64, 128, 256]),
    ],
)
def test_the_block_lengths_of_hex(tokens: int, lengths: list[int]):
    driver = Vote(hex=True, max_tokens=tokens)
    options = driver.request_options()
    assert [each["block_length"] for each in options] == lengths
    assert {each["steps"] for each in options} == {tokens // 2}
    assert (driver.seeds, driver.heat) == (1, 0.0)


# mcts -----------------------------------------------------------------------------


def test_which_child_is_taken():
    node = Node(Text((1,)), visits=4)
    children = [
        Child(token, 0.0, prior, best, returns)
        for token, (best, prior, returns) in enumerate(
            [(1.0, 0.5, 2), (0.2, 0.3, 1), (None, 0.2, 0)]
        )
    ]
    urges = [ProbabilityGuided().urge(child, node, node) for child in children]
    assert urges == pytest.approx([1.8645, 0.9781, 1.0374], abs=2e-4)


def test_value_guided_urges():
    root = Node(Text((1,)), visits=9)
    for value, visits, wanted in ((0.9, 4, 1.5786), (0.5, 1, 1.5730)):
        child = Child(1, 0.0, 1.0, node=Node(Text((1, 1)), visits=visits, value=value))
        urge = ValueGuided().urge(child, root, root)
        assert urge == pytest.approx(wanted, abs=1e-3)


def test_the_second_roll_out_finds_it():
    model = TableModel(table({"": {"a": 0.6, "b": 0.4}}))
    scored = []

    def scorer(candidates: list[Candidate]) -> list[float]:
        scored.extend(each.text for each in candidates)
        return [float(each.text == "b") for each in candidates]

    result = one(model, "mcts", scorer=scorer, width=2, rollouts=2)
    assert scored == ["a", "b"]
    assert result.best.text == "b" and result.best.score == 1
    # The next tokens of the prompt, and what follows each of them.
    assert result.stats.requests == 3


def test_the_greedy_path_is_free():
    """A completion is used again for the nodes that it leads through."""
    rows = {"": {"a": 0.9, "b": 0.1}, "a": {"c": 0.9, "d": 0.1}}
    model = TableModel(table(rows))
    one(model, "mcts", scorer=by_text({"x": 1.0}), width=1, rollouts=3)
    completions = [job for job in model.asked if not job.top]
    assert len(completions) == 1


def test_a_horizon_scores_unfinished_texts():
    rows = {"": {"a": 0.6, "b": 0.4}, "b": {"c": 1.0}, "bc": {"d": 1.0}}
    model = TableModel(table(rows))
    seen = []

    def scorer(candidates: list[Candidate]) -> list[float]:
        seen.extend((each.text, each.finished) for each in candidates)
        return [0.5 * each.text.startswith("b") for each in candidates]

    result = one(model, "mcts", scorer=scorer, width=2, rollouts=2, horizon=1)
    # "a" ends with the token behind it, which is within the horizon.
    assert seen == [("a", True), ("bc", False)]
    assert result.best.text == "a"
    result = one(model, "mcts", scorer=scorer, width=2, rollouts=2, horizon=0)
    assert result.best.text == "bcd" and result.best.finished


def test_no_token_is_allowed():
    model = TableModel(table({"": {"a": 1.0}}))
    result = one(model, "mcts", scorer=constant(0), policy=ValueGuided(allowed=()))
    assert result.best.text == "a"


def test_value_guided_search_keeps_to_allowed_tokens():
    rows = {"": {"a": 0.5, "b": 0.3, "c": 0.2}, "c": {"b": 0.9, "c": 0.1}}
    model = TableModel(table(rows))
    result = one(
        model,
        "mcts",
        scorer=by_text({"cc": 0.9, "c": 0.8}),
        policy=ValueGuided(allowed={*ids("bc"), END}),
        horizon=0,
        width=2,
        rollouts=12,
    )
    assert result.best.text == "cc"
    assert not any(each.text.startswith("a") for each in result.candidates)


# best_first -----------------------------------------------------------------------


def test_which_text_is_gone_on_from():
    frontier = Frontier()
    frontier.push(Text((1,), (1,)), 0.0, 0.3)
    frontier.push(Text((1,), (2,)), 0.1, 0.6)
    assert frontier.pop()[0].written == (1,)
    frontier.push(Text((1,), (1, 1)), 0.2, 0.5)
    # Both cost 0.7: the longer one.
    assert frontier.pop()[0].written == (1, 1)


def test_the_best_steps_are_followed():
    rows = {
        "": {"a": 0.5, "b": 0.5},
        "a": {".": 1.0},
        "b": {".": 1.0},
        "a.": {"c": 0.5, "d": 0.5},
        "b.": {"e": 1.0},
    }
    model = TableModel(table(rows))
    scores = {"a.": 0.7, "b.": 0.4, "a.c": 0.5, "a.d": 0.9, "b.e": 1.0}
    result = one(model, "best_first", scorer=by_text(scores), k=12, step_stop=(".",))
    assert result.best.text == "a.d" and result.best.finished
    assert not any(job.text.written == ids("b.") for job in model.asked)


def test_when_the_expansions_are_over():
    """The best text of the frontier is completed."""
    rows = {"": {"a": 0.5, "b": 0.5}, "b": {"c": 1.0}}
    model = TableModel(table(rows))
    result = one(
        model,
        "best_first",
        scorer=by_text({"a": 0.1, "b": 0.2}),
        k=12,
        step_tokens=1,
        expansions=1,
    )
    assert result.best.text == "bc" and result.best.finished


def test_a_score_above_one_is_refused():
    model = TableModel(table({"": {"a": 1.0}}))
    with pytest.raises(ValueError, match="from 0 to 1, and that of prompt 0 is 3"):
        one(model, "best_first", scorer=by_text({"a": 3.0}), step_tokens=1)


# particles ------------------------------------------------------------------------


def test_weights_and_resampling():
    weights = normalised([-1, -1.2, -3, -6])
    assert weights == pytest.approx([0.51, 0.4175, 0.069, 0.0034], abs=1e-3)
    assert effective(weights) == pytest.approx(2.277, abs=1e-2)
    weights = normalised([0, -4, -4, -4])
    assert effective(weights) == pytest.approx(1.1, abs=0.02)
    assert resample(weights, 0.3) == [0, 0, 0, 0]
    assert resample([0.25] * 4, 0.99) == [0, 1, 2, 3]
    assert normalised([-math.inf] * 2) == [0.5, 0.5]


def test_particles_follow_the_scores():
    rows = {
        "": {"a": 0.7, "b": 0.3},
        "a": {"a": 1.0},
        "b": {"a": 0.5, "b": 0.5},
    }
    model = TableModel(table(rows))
    result = one(
        model,
        "particles",
        scorer=lambda found: [float(each.text.count("b")) for each in found],
        beta=5,
        n=16,
        step_tokens=1,
    )
    assert result.best.text == "bb"
    # All that is left are copies of those that began well.
    assert {each.text[0] for each in result.candidates} == {"b"}


@pytest.mark.parametrize("bad", ["a", "ab"])
def test_particles_whose_score_is_the_lowest(bad: str):
    rows = {before: {"a": 0.5, "b": 0.5} for before in ("", "a", "b", "ab")}
    result = one(
        TableModel(table(rows)),
        "particles",
        scorer=lambda found: [-math.inf if c.text == bad else 0.0 for c in found],
        n=8,
        step_tokens=1,
        max_tokens=3,
    )
    assert result.best.score == 0.0


def test_without_a_scorer_the_likeliest_particle():
    model = TableModel(table({"": {"a": 0.7, "b": 0.3}, "b": {"c": 1.0}}))
    result = one(model, "particles", n=8, step_tokens=1)
    assert result.best.text == "a"
    assert result.best.score == pytest.approx(math.log(0.7))


# lookahead ------------------------------------------------------------------------

FORK = {
    "": {"a": 0.5, "b": 0.45, "z": 0.05},
    "a": {"c": 0.4, "d": 0.35, "e": 0.25},
    "b": {"c": 1.0},
}
"""The likelier token leads to where nobody knows how to go on."""


def test_adadec_takes_the_token_behind_which_it_is_sure():
    model = TableModel(table(FORK))
    result = one(model, "lookahead", tau=0.5)
    assert result.best.text == "bc" and result.best.origin == {"looks": 1}
    assert one(model, "lookahead", tau=2.0).best.text == "ac"


def test_adadecs_mean_log_probability():
    a = (-1.0 + 5 * -0.1) / 6
    b = (-1.2 + 5 * -0.02) / 6
    assert (a, b) == pytest.approx((-0.25, -0.21667), abs=1e-5)
    p, q = math.exp(-1.0), math.exp(-1.2)
    x, y = math.exp(-0.1), math.exp(-0.02)
    rest = (1 - p - q) / 2
    rows: dict[str, dict[str, float]] = {"": {"a": p, "b": q, "y": rest, "z": rest}}
    for letter, sure in (("a", x), ("b", y)):
        for length in range(1, 7):
            rows[letter * length] = {letter: sure, "z": 1 - sure}
    rows["a" * 7] = rows["b" * 7] = {"$": 1.0}
    model = TableModel(table(rows))
    assert one(model, "lookahead", tau=0.9, k=2, max_tokens=7).best.text[0] == "b"


def test_entropy_counts_what_is_not_seen_as_one():
    seen = [(1, math.log(0.5)), (2, math.log(0.25))]
    assert entropy(seen) == pytest.approx(1.5 * math.log(2))


def transfer(rewards: dict[str, float], **options: Any) -> Any:
    """Log-probabilities 3, 2.5 and 1, less a constant."""
    total = sum(math.exp(x) for x in (3, 2.5, 1))
    row = {
        name: math.exp(x) / total for name, x in zip("abc", (3, 2.5, 1), strict=True)
    }
    model = TableModel(table({"": row}))
    return one(
        model,
        "lookahead",
        method="transfer",
        scorer=by_text(rewards),
        max_tokens=1,
        **options,
    )


def test_transfer_adds_the_reward():
    assert transfer({"a": -1, "b": 1, "c": 2}).best.text == "b"
    assert transfer({"a": -1, "b": 1, "c": 2}, weight=5.0).best.text == "c"


def test_transfer_with_a_baseline():
    """exp((r2 - r1) / 2) * r2: what the baseline likes as much counts less."""
    rewards = {"a": 1.0, "b": 2.0, "c": 2.5}
    assert transfer(rewards).best.text == "b"
    result = transfer(rewards, baseline=by_text({"a": -1.0, "b": 2.0, "c": 2.5}))
    assert result.best.text == "a"


def test_transfer_lets_another_model_write_on():
    mine = TableModel(table({"": {"a": 0.6, "b": 0.4}}))
    other = TableModel(table({"b": {"c": 1.0}}))
    result = one(
        mine,
        "lookahead",
        method="transfer",
        scorer=by_text({"bc": 5.0}),
        continue_with=other,
        k=2,
    )
    assert result.best.text == "b"
    assert len(other.asked) == 2 and all(job.max_tokens == 20 for job in other.asked)


def test_transfer_draws_with_a_temperature():
    texts = {transfer({}, temperature=2.0, seed=seed).best.text for seed in range(30)}
    assert texts == {"a", "b", "c"}


def test_a_learned_threshold_tells_the_two_apart():
    entropies = [0.1 * i for i in range(20)]
    found = learn_threshold(entropies, [h < 0.95 for h in entropies])
    assert 0.5 < found < 1.4
    with pytest.raises(ValueError, match="at least 2 of each; here are 3 and 0"):
        learn_threshold([0.1, 0.2, 0.3], [True] * 3)
    with pytest.raises(ValueError, match="no threshold"):
        learn_threshold(entropies, [h > 0.95 for h in entropies])


def test_reading_entropies():
    entropies, is_first = read_entropies(TableModel(table(FORK)), ["?"], ["bc"])
    assert is_first == [False, True]
    assert entropies[1] == pytest.approx(0)
    assert entropies[0] > 0.5
