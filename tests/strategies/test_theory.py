# SPDX-License-Identifier: Apache-2.0
"""What a perfect model costs each rule: ParallelBench's closed forms, exactly.

The numbers of arXiv 2510.04767 hold for a model that knows its task. Here they come
from following every draw (`reference/ideal_model.py`), with the strategies themselves.
"""

from math import factorial, log, prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from reference.ideal_model import Chance, chance, copy, replace_any, shuffle
from reference.registered import NAMES, build
from tiers import fast

from vllm_dlm.strategies import STRATEGIES, Strategy

LENGTHS = (3, 4, 5, 6)
SHORT_FIRST = fast(*LENGTHS[:3], of=LENGTHS)
"""Six names take as many seconds as all others together."""


def right(strategy: Strategy, task: Any, **options: Any) -> float:
    return chance(strategy, task, **options).right


# -- what holds for every strategy ----------------------------------------


@st.composite
def numbers(draw: st.DrawFn, params: type[BaseModel]) -> dict[str, Any]:
    """Any numbers that the parameters' bounds allow, each or none of them."""
    drawn = {}
    for name, bounds in params.model_json_schema()["properties"].items():
        limits = {
            "min_value": bounds.get("minimum", bounds.get("exclusiveMinimum")),
            "max_value": bounds.get("maximum", bounds.get("exclusiveMaximum")),
        }
        if bounds.get("type") == "number":
            drawn[name] = draw(
                st.floats(
                    **limits,
                    exclude_min="exclusiveMinimum" in bounds,
                    exclude_max="exclusiveMaximum" in bounds,
                )
            )
        elif bounds.get("type") == "integer":
            drawn[name] = draw(st.integers(**limits))
        if name in drawn and draw(st.booleans()):
            del drawn[name]
    return drawn


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", LENGTHS)
def test_copying_is_right_at_any_parallelism(name, length):
    for scheduled in range(1, length + 1):
        found = chance(build(name, length), copy(length), scheduled)
        assert found == Chance(1.0, 0.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data(), scheduled=st.integers(1, 4))
def test_copying_is_right_with_any_parameters(name, data, scheduled):
    params = data.draw(numbers(STRATEGIES[name].Params))
    try:
        strategy = build(name, 4, **params)
    except ValueError:
        return  # The parameters contradict each other.
    assert right(strategy, copy(4), scheduled=scheduled) == 1.0


@pytest.mark.parametrize("task", [replace_any, shuffle])
@pytest.mark.parametrize("name", NAMES)
def test_one_token_at_a_time_is_never_wrong(name, task):
    for drawn in (False, True):
        found = chance(build(name, 4), task(4), drawn=drawn)
        assert found.right + found.wrong == pytest.approx(1.0)
        assert found.wrong_one_by_one == 0.0


# -- a fixed number at a time ---------------------------------------------

# Of the most confident, the most probable token; two equally likely ones by a coin.
# The paper's "0.5 for k = 2, 0 above" is that of k which divide n.
REPLACE_ANY = {
    3: [1, 1, 0],
    4: [1, 0.5, 1, 0],
    5: [1, 1, 0.5, 1, 0],
    6: [1, 0.5, 0, 0.5, 1, 0],
}
ORDERED = ("low_confidence", "margin", "entropy", "left_to_right", "random")


@pytest.mark.parametrize("mode", ORDERED)
@pytest.mark.parametrize("length", LENGTHS)
def test_replacing_any_name_greedily(length, mode):
    strategy = build("static", length, mode=mode)
    found = [
        right(strategy, replace_any(length), scheduled=count + 1)
        for count in range(length)
    ]
    assert found == REPLACE_ANY[length]


@pytest.mark.parametrize("length", LENGTHS)
def test_replacing_any_name_by_drawing_at_once(length):
    found = right(
        build("static", length), replace_any(length), scheduled=length, drawn=True
    )
    assert found == pytest.approx(((length - 1) / length) ** (length - 1))


def without_collision(length: int, count: int) -> float:
    """No name twice, where each step draws `count` of the names left."""
    chance, left = 1.0, length
    while left:
        now = min(count, left)
        chance *= prod(left - i for i in range(now)) / left**now
        left -= now
    return chance


@pytest.mark.parametrize("length", SHORT_FIRST)
def test_shuffling_is_right_where_no_name_is_drawn_twice(length):
    for count in range(1, length + 1):
        found = right(
            build("static", length), shuffle(length), scheduled=count, drawn=True
        )
        assert found == pytest.approx(without_collision(length, count))
    assert found == pytest.approx(factorial(length) / length**length)


@pytest.mark.parametrize("length", SHORT_FIRST)
def test_shuffling_block_by_block_where_all_is_sure(length):
    """Each step fills a block, and none of the next: that is not open before."""
    for block in range(1, length + 1):
        strategy = build("multi_block", length, block=block, threshold=100.0)
        found = right(strategy, shuffle(length), drawn=True)
        assert found == pytest.approx(without_collision(length, block))


@pytest.mark.parametrize("length", [4, 6])
def test_shuffling_by_pairs(length):
    odd, even = prod(range(1, length, 2)), prod(range(2, length + 1, 2))
    assert without_collision(length, 2) == pytest.approx(odd / even)


# -- a threshold ----------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_a_threshold_that_equals_the_confidence(length):
    """Each name is kept with (n - 1) / n: who takes that for sure keeps them all."""
    task, bound = replace_any(length), (length - 1) / length
    assert right(build("threshold", length, threshold=bound), task) == 0.0
    assert right(build("threshold", length, threshold=bound, strict=True), task) == 1.0
    assert right(build("threshold", length, threshold=bound + 0.001), task) == 1.0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("length", SHORT_FIRST)
def test_shuffling_above_one_half_is_one_by_one(length, strict):
    strategy = build("threshold", length, threshold=0.501, strict=strict)
    for drawn in (False, True):
        found = right(strategy, shuffle(length), drawn=drawn)
        assert found == pytest.approx(1.0)


# -- a gap ----------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_replacing_any_name_at_the_gap_that_there_is(length):
    """Each name is kept with (n - 1) / n, so the two best differ by log(n - 1)."""
    task, there = replace_any(length), log(length - 1)
    for bound, drawn, expected in (
        (there - 0.001, False, 0.0),
        (there - 0.001, True, ((length - 1) / length) ** (length - 1)),
        (there + 0.001, False, 1.0),
        (there + 0.001, True, 1.0),
    ):
        bounds = dict.fromkeys(("early", "middle", "late"), bound)
        found = right(build("prophet", length, **bounds), task, drawn=drawn)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("length", SHORT_FIRST)
def test_shuffling_has_no_gap(length):
    """All that is left is as probable: as one by one, or all at once."""
    for bound, expected in ((0.001, 1.0), (0.0, factorial(length) / length**length)):
        bounds = dict.fromkeys(("early", "middle", "late"), bound)
        found = right(build("prophet", length, **bounds), shuffle(length), drawn=True)
        assert found == pytest.approx(expected)
