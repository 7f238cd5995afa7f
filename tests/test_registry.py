# SPDX-License-Identifier: Apache-2.0
"""The registry: lazy, and helpful about names it does not know."""

import sys

import pytest

from vllm_dlm.model_executor.sampling.observers import OBSERVERS
from vllm_dlm.registry import Registry
from vllm_dlm.search.registry import SEARCHES
from vllm_dlm.strategies import STRATEGIES


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


def test_packages_add_names_and_replace_none(tmp_path, monkeypatch):
    """Through an entry point of an installed distribution."""
    installed = tmp_path / "grocer-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: grocer\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[tests.fruit]\nplum = collections:Counter\napple = no.such:Thing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    ours = {"apple": "fractions:Fraction"}
    registry = Registry("fruit", ours, group="tests.fruit")
    assert registry.names() == ["apple", "plum"]
    assert registry["plum"].__name__ == "Counter"
    assert registry["apple"].__name__ == "Fraction"
    assert Registry("fruit", ours).names() == ["apple"]


@pytest.mark.parametrize(
    ("registry", "group"),
    [
        (STRATEGIES, "vllm_dlm.strategies"),
        (OBSERVERS, "vllm_dlm.observers"),
        (SEARCHES, "vllm_dlm.searches"),
    ],
)
def test_groups_that_are_promised(registry, group):
    assert registry.group == group
