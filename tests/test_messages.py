# SPDX-License-Identifier: Apache-2.0
"""What a client sent decides neither a message's length nor whether it can be sent."""

import json
import tracemalloc

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_dlm.messages import (
    LONGEST_MESSAGE,
    LONGEST_QUOTE,
    MOST_FINDINGS,
    bounded,
    explain,
    name_of,
    quote,
    unknown,
)

MILLION = 10**6
HOSTILE = {
    "text": "x" * MILLION,
    "list": list(range(MILLION)),
    "keys": {str(number): number for number in range(100_000)},
    "one long key": {"x" * MILLION: 1},
    "long entries": ["x" * MILLION] * 5,
    "nested": [[["x" * MILLION] * 9] * 9] * 9,
    "number": 10**4000,
    "larger than Python prints": 10**10_000,
    "surrogate": "a\ud800b",
    "bytes": b"x" * MILLION,
    "any object": object(),
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("high", "'high'"),
        (0.5, "0.5"),
        (True, "True"),
        (None, "None"),
        (-(2**64), "-18446744073709551616"),
        ([0.5, "a"], "[0.5, 'a']"),
        ({"a": [1]}, "{'a': [1]}"),
        ((), "[]"),
    ],
)
def test_short_values_are_shown_whole(value, expected):
    assert quote(value) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_long_values_are_cut_and_cost_nothing(name):
    tracemalloc.start()
    try:
        text = quote(HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(text) < 12 * LONGEST_QUOTE
    assert peak < 500_000  # other threads of the process allocate meanwhile
    text.encode("utf-8")


def test_names_are_bounded_too():
    assert name_of("dlm_threshold") == "dlm_threshold"
    assert len(name_of("x" * MILLION)) < 2 * LONGEST_QUOTE
    name_of("\ud800").encode("utf-8")
    assert len(unknown("x" * MILLION, ["threshold"])) < 3 * LONGEST_QUOTE
    assert "Did you mean 'threshold'?" in unknown("treshold", ["threshold"])


def test_a_message_is_bounded_and_valid_utf8():
    assert bounded("too high") == "too high"
    assert len(bounded("x" * MILLION)) < LONGEST_MESSAGE + 100
    json.dumps(bounded("a\ud800"), ensure_ascii=False).encode("utf-8")


def test_few_findings_are_named_and_the_others_counted():
    class Numbers(BaseModel):
        model_config = ConfigDict(extra="forbid")
        first: list[int] = []

    with pytest.raises(ValidationError) as caught:
        Numbers(first=["a"] * 1000, second=1)
    message = explain(caught.value, {"first": "dlm_first"})
    assert message.startswith("dlm_first.0: Input should be a valid integer")
    assert message.count("Input should be") == MOST_FINDINGS
    assert message.endswith("and 998 more")
