# SPDX-License-Identifier: Apache-2.0
"""The registry: lazy, and helpful about names it does not know."""

import sys

import pytest

from vllm_dlm.registry import Registry


def make() -> Registry[type]:
    return Registry("fruit", {"apple": "fractions:Fraction", "pear": "no.such:Thing"})


def test_names_are_listed_without_importing_anything():
    assert make().names() == ["apple", "pear"]
    assert "no" not in sys.modules


def test_an_entry_is_imported_when_it_is_asked_for():
    assert make()["apple"].__name__ == "Fraction"
    with pytest.raises(ModuleNotFoundError):
        make()["pear"]


@pytest.mark.parametrize("name", ["plum", 3, None])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown fruit .*: apple, pear"):
        make()[name]


def test_a_taken_name_is_refused():
    registry = make()
    registry.register("fig", dict)
    assert registry["fig"] is dict
    with pytest.raises(ValueError, match="'fig' is registered already"):
        registry.register("fig", list)
