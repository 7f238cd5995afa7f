# SPDX-License-Identifier: Apache-2.0
"""Accuracy under parallelism; the numbers are worked out by hand."""

from math import exp
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.bench import report
from vllm_dlm.bench.aup import Point, aup, scores


def test_one_point_is_accuracy_times_parallelism():
    assert aup([Point(1.0, 74.1)], best=74.98) == (pytest.approx(74.1), 1)
    assert aup([Point(3.0, 50.0)], best=100.0) == (pytest.approx(150.0), 1)


def test_what_is_lost_weighs_less():
    """W(78) = exp(-3 * 2 / 80) = .92774, W(76) = exp(-3 * 4 / 80) = .86071.

    80 + 2 (80 + 78 * .92774) / 2 + 2 (78 * .92774 + 76 * .86071) / 2
       = 80 + 152.364 + 137.778
    """
    points = [Point(3.0, 78.0), Point(1.0, 80.0), Point(5.0, 76.0)]
    score, count = aup(points, best=80.0)
    assert count == 3
    assert score == pytest.approx(370.142, abs=1e-3)


def test_published_points_of_d3llm():
    """LLaDA on GSM8K: 74.02 at 1, 73.09 at 9.11; the best of all methods is 74.98.

    W(74.02) = exp(-3 * .96 / 74.98) = .96232, W(73.09) = exp(-3 * 1.89 / 74.98) =
    .92716; 74.02 + 8.11 (71.231 + 67.766) / 2 = 637.65
    """
    score, _ = aup([Point(1.0, 74.02), Point(9.11, 73.09)], best=74.98)
    assert score == pytest.approx(637.65, abs=0.02)


def test_more_than_five_points_lost_do_not_count():
    points = [Point(1.0, 80.0), Point(2.0, 75.0), Point(4.0, 74.9), Point(3.0, 76.0)]
    # 80 | 80 + 75 W(75) | 75 W(75) + 76 W(76)
    w75, w76 = 75 * exp(-3 * 5 / 80), 76 * exp(-3 * 4 / 80)
    score, count = aup(points, best=80.0)
    assert count == 3
    assert score == pytest.approx(80 + (80 + w75) / 2 + (w75 + w76) / 2)


@given(
    st.lists(
        st.tuples(st.floats(0.5, 50.0), st.floats(60.0, 64.0)), min_size=1, max_size=6
    )
)
def test_bounds(pairs):
    """Between the first point alone, and all tokens as right as the best."""
    points = [Point(*pair) for pair in pairs]
    score, _ = aup(points, best=64.0)
    first = min(points)
    longest = max(point.tokens_per_forward for point in points)
    assert score >= first.tokens_per_forward * first.accuracy - 1e-9
    assert score <= longest * 64.0 + 1e-9
    # A method that loses nothing scores its accuracy times its tokens per forward.
    lossless = [Point(point.tokens_per_forward, 64.0) for point in points]
    assert aup(lossless, best=64.0)[0] == pytest.approx(longest * 64.0)


def cell(
    strategy: str, rho: float | None, accuracy: float | None, **changes: Any
) -> dict[str, Any]:
    cache = changes.pop("cache", "none")
    return {
        "engine": "vllm-dlm",
        "dtype": "float32",
        "strategy": strategy.partition(":")[0],
        "setting": f"{strategy}, {cache}",
        "concurrency": 1,
        "tokens_per_forward": rho,
        "accuracy": accuracy,
    } | changes


def test_methods_of_a_run():
    cells = [
        cell("static", 1.0, 0.80),
        cell("threshold", 3.0, 0.78),
        cell("threshold:threshold=0.7", 5.0, 0.76),
        cell("static", 2.0, 0.70, cache="dual"),
        cell("threshold", 4.0, 0.70, cache="dual:x=1"),
        cell("eb", None, 0.9),
        cell("ar", 1.0, None),
    ]
    found = scores(cells)
    assert [(s.method, s.points, round(s.aup, 1)) for s in found] == [
        ("vllm-dlm: threshold, none", 3, 370.1),
        ("vllm-dlm: threshold, dual:x=1", 1, 280.0),
        ("vllm-dlm: static, dual", 1, 140.0),
        ("vllm-dlm: static, none", 1, 80.0),
    ]
    assert {s.at_once for s in found} == {1}


def test_a_run_without_right_answers_has_no_score():
    assert scores([]) == scores([cell("static", 1.0, 0.0)]) == []


def test_the_table_stands_below_the_others(capsys):
    cells = [cell("static", 1.0, 0.80), cell("threshold", 3.0, 0.78)]
    report.print_table(cells)
    *_, heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[-3:] == ["once", "points", "AUP"]
    assert first.split() == ["vllm-dlm:", "threshold,", "none", "1", "2", "232.4"]
    assert second.split()[-3:] == ["1", "1", "80.0"]
    report.print_table([cell("static", 1.0, None)])
    assert "AUP" not in capsys.readouterr().out
