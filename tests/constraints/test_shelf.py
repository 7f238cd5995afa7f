# SPDX-License-Identifier: Apache-2.0
"""Automata in files: the same, or none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from vllm_dlm.constraints.automaton import Automaton, compile_pattern
from vllm_dlm.constraints.shelf import Shelf, file_name, read
from vllm_dlm.constraints.thoughts import ThoughtEnd
from vllm_dlm.constraints.vocabulary import Vocabulary

VOCABULARY = Vocabulary.of_tokens([b"a", b"b", b"ab", b""])


def compiled(pattern: str) -> Automaton:
    return compile_pattern(pattern, VOCABULARY, [3])


def test_what_is_read_is_what_was_put():
    shelf = Shelf()
    assert shelf.folder is None
    shelf.put("one.npz", compiled("(ab|b)+"))
    assert shelf.folder is not None
    assert Path(shelf.folder).stat().st_mode & 0o77 == 0
    found = read(shelf.folder, "one.npz")
    assert found is not None
    for field in dataclasses.fields(Automaton):
        expected = getattr(compiled("(ab|b)+"), field.name)
        np.testing.assert_array_equal(getattr(found, field.name), expected)
    assert not found.transitions.flags.writeable


def test_what_cannot_be_read_is_not_there(tmp_path: Path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "other.npz", class_of=np.zeros(3))
    (tmp_path / "folder.npz").mkdir()
    for name in ("missing.npz", "text.npz", "other.npz", "folder.npz"):
        assert read(str(tmp_path), name) is None


def test_the_oldest_files_go():
    size = 8 * 1024
    shelf = Shelf(most_bytes=size)
    for number in range(9):
        shelf.put(f"{number}.npz", compiled(f"a{{{number + 1}}}b"))
    assert shelf.folder is not None
    left = sorted(file.name for file in Path(shelf.folder).iterdir())
    assert "8.npz" in left and "0.npz" not in left
    assert sum(Path(shelf.folder, name).stat().st_size for name in left) <= size


def test_names_say_what_an_automaton_is_made_of():
    names = {
        file_name(pattern, thought, tokenizer, ends, barred)
        for pattern in ("a", "b")
        for thought in (None, ThoughtEnd(5, "</t>"), ThoughtEnd(6, "</t>"))
        for tokenizer in ("x", "y")
        for ends in ([1], [1, 2])
        for barred in ([], [3])
    }
    assert len(names) == 48
