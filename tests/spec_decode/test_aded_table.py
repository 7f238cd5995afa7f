# SPDX-License-Identifier: Apache-2.0
"""Tables of tri-grams: counting, keeping the most frequent, files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.aded import corpus_weights
from safetensors.numpy import load_file, save_file

from vllm_dlm.spec_decode.aded import trigram_table
from vllm_dlm.spec_decode.aded.trigram_table import (
    TrigramCounts,
    TrigramTable,
    empty_table,
    load_table,
    save_table,
)


def contents(table: TrigramTable) -> dict[tuple[int, int], list[tuple[int, float]]]:
    found = {}
    for first in range(table.vocab_size):
        for pair in range(table.firsts[first], table.firsts[first + 1]):
            places = range(table.starts[pair], table.starts[pair + 1])
            found[first, int(table.seconds[pair])] = [
                (int(table.tokens[place]), float(table.weights[place]))
                for place in places
            ]
    return found


@given(
    texts=st.lists(st.lists(st.integers(0, 4), max_size=30), max_size=6),
    keep=st.integers(1, 5),
    chunk=st.integers(1, 40),
)
def test_shares_against_plain_python(texts, keep, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trigram_table, "_CHUNK", chunk)
        counts = TrigramCounts(5)
        for text in texts:
            counts.add(text)
        table = counts.table(keep)
    assert contents(table) == corpus_weights(texts, keep)
    assert counts.num_trigrams == sum(max(0, len(text) - 2) for text in texts)


def test_rare_trigrams_are_left_out_but_count_in_the_shares():
    counts = TrigramCounts(9)
    for text in ([1, 2, 3], [1, 2, 3], [1, 2, 4], [5, 6, 7]):
        counts.add(text)
    assert contents(counts.table(min_count=2)) == {(1, 2): [(3, pytest.approx(2 / 3))]}


@pytest.mark.parametrize("size", [0, (1 << 21) + 1])
def test_vocabularies_that_do_not_fit(size: int):
    with pytest.raises(ValueError, match="expected 1 to 2097152"):
        TrigramCounts(size)


@pytest.mark.parametrize("token", [-1, 9])
def test_tokens_outside_the_vocabulary(token: int):
    with pytest.raises(ValueError, match="do not fit the vocabulary of 9"):
        TrigramCounts(9).add([1, 2, token])


def test_the_largest_vocabulary():
    last = (1 << 21) - 1
    counts = TrigramCounts(last + 1)
    counts.add([last, last, last, 0, last])
    assert contents(counts.table()) == {
        (last, last): [(0, 0.5), (last, 0.5)],
        (last, 0): [(last, 1.0)],
    }


@pytest.fixture
def table() -> TrigramTable:
    counts = TrigramCounts(64)
    counts.add(np.random.default_rng(0).integers(0, 64, 500))
    return counts.table()


FACTS = {"tokenizer": "some-model", "fingerprint": "one"}


@pytest.mark.parametrize("facts", [{}, FACTS])
@pytest.mark.parametrize("fingerprint", [None, "one"])
def test_files(tmp_path: Path, table: TrigramTable, facts, fingerprint):
    path = tmp_path / "new" / "table.safetensors"
    save_table(path, table, facts)
    for read, written in zip(load_table(path, 70, fingerprint), table, strict=True):
        assert read.dtype == written.dtype
        assert (read == written).all()


def test_an_empty_table(tmp_path: Path):
    save_table(tmp_path / "t", empty_table(8))
    assert contents(load_table(tmp_path / "t", 8)) == {}


def test_another_vocabulary_is_refused(tmp_path: Path, table: TrigramTable):
    save_table(tmp_path / "t", table, FACTS)
    with pytest.raises(ValueError, match=r"some-model \(64 tokens; this model has 63"):
        load_table(tmp_path / "t", 63, "one")
    with pytest.raises(ValueError, match="another vocabulary.*count-trigrams"):
        load_table(tmp_path / "t", 64, "two")


def test_files_that_hold_no_table(tmp_path: Path, table: TrigramTable):
    with pytest.raises(ValueError, match="cannot read the tri-grams.*count-trigrams"):
        load_table(tmp_path / "none", 64)
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no tri-grams"):
        load_table(tmp_path / "other", 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("firsts", np.int64(501)),
        ("starts", np.int64(-1)),
        ("tokens", np.int32(64)),
        ("weights", np.float32(np.nan)),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, table: TrigramTable, name, value):
    """The loops that look tokens up check no bounds."""
    path = tmp_path / "table"
    save_table(path, table)
    arrays = load_file(path)
    arrays[name][3] = value
    metadata = {"format": "tri-grams 1", "vocab_size": "64"}
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(ValueError, match="are damaged"):
        load_table(path, 64)


def test_a_tokenizers_fingerprint():
    class Tokenizer:
        def __init__(self, **vocabulary: int) -> None:
            self.get_vocab = lambda: vocabulary

    one = trigram_table.fingerprint(Tokenizer(a=0, b=1))
    assert one == trigram_table.fingerprint(Tokenizer(b=1, a=0))
    assert one != trigram_table.fingerprint(Tokenizer(a=1, b=0))
    assert one != trigram_table.fingerprint(Tokenizer(a=0, b=1, c=2))
