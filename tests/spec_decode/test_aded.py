# SPDX-License-Identifier: Apache-2.0
"""ADED's drafts, with numbers worked out by hand and against the plain-Python form."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import aded as reference

from vllm_dlm.spec_decode.aded import trigram_search
from vllm_dlm.spec_decode.aded.drafting import AdaptiveTrigrams, Memory
from vllm_dlm.spec_decode.aded.trigram_table import (
    TrigramCounts,
    TrigramTable,
    empty_table,
)
from vllm_dlm.spec_decode.options import Aded

VOCAB = 6
sequences = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def table_of(*texts: list[int], vocab_size: int = VOCAB) -> TrigramTable:
    counts = TrigramCounts(vocab_size)
    for text in texts:
        counts.add(text)
    return counts.table()


def array(text: list[int]) -> np.ndarray:
    return np.array(text, np.int32)


def test_the_score_of_a_child():
    assert trigram_search.score(2.0, 1, 0.6, 3) == pytest.approx(18.838, abs=1e-3)
    assert trigram_search.score(1.5, 1, 0.4, 3) == pytest.approx(12.726, abs=1e-3)


def test_each_round_adds_to_what_is_in_the_window():
    trigrams = AdaptiveTrigrams(table_of([1, 2, 3], [1, 2, 4]), Aded())
    assert dict(trigrams.successors(1, 2)) == {3: 0.5, 4: 0.5}
    text = [1, 2, 3]
    for token in (0, 5, 5):
        trigrams.observe(array(text))
        text.append(token)
    assert dict(trigrams.successors(1, 2)) == pytest.approx({3: 0.62, 4: 0.5})
    assert dict(trigrams.successors(3, 0)) == pytest.approx({5: 0.04})


def test_what_the_window_has_left_gains_no_more():
    trigrams = AdaptiveTrigrams(empty_table(64), Aded(window=4))
    for length in range(3, 10):
        trigrams.observe(np.arange(length, dtype=np.int32))
    # In the window of the round that brought it, and of the next.
    assert trigrams.successors(2, 3) == [(4, pytest.approx(0.08))]


@pytest.mark.parametrize("learn_prompt", [True, False])
def test_the_prompt_counts_once(learn_prompt: bool):
    options = Aded(window=4, learn_prompt=learn_prompt)
    trigrams = AdaptiveTrigrams(empty_table(64), options)
    text = np.arange(20, dtype=np.int32)
    trigrams.observe(text)
    trigrams.observe(text)
    assert bool(trigrams.successors(0, 1)) == learn_prompt
    assert trigrams.successors(17, 18) == [(19, pytest.approx(0.08))]


def test_tokens_of_a_long_round_count_though_the_window_is_shorter():
    trigrams = AdaptiveTrigrams(empty_table(64), Aded(window=3, learn_prompt=False))
    for length in (5, 15):
        trigrams.observe(np.arange(length, dtype=np.int32))
    assert not trigrams.successors(1, 2)
    for first in range(3, 13):
        assert len(trigrams.successors(first - 1, first)) == 1


def test_placeholders_outside_the_vocabulary_are_never_drafted():
    trigrams = AdaptiveTrigrams(empty_table(8), Aded())
    text = array([1, 2, 9, 1, 2, -1, 1, 2])
    trigrams.observe(text)
    assert trigrams.best_chain(text, 8) == []


def test_the_text_repeats_itself():
    trigrams = AdaptiveTrigrams(empty_table(64), Aded())
    text = array([7, 8, 9, 10, 11, 12, 7, 8])
    trigrams.observe(text)
    assert trigrams.best_chain(text, 5) == [9, 10, 11, 12, 7]


def test_the_corpus_is_followed_beyond_the_search():
    trigrams = AdaptiveTrigrams(table_of(list(range(30)), vocab_size=32), Aded(depth=2))
    assert trigrams.best_chain(array([3, 4]), 6) == [5, 6, 7, 8, 9, 10]
    assert trigrams.best_chain(array([27, 28]), 6) == [29]
    assert trigrams.best_chain(array([4, 3]), 6) == []


@pytest.mark.parametrize(("shares", "drafted"), [(False, [3]), (True, [4])])
def test_who_shares_a_memory_is_taught(shares: bool, drafted: list[int]):
    table = table_of([1, 2, 3], [1, 2, 4])
    memory = Memory(table, Aded()) if shares else None
    taught, other = (AdaptiveTrigrams(table, Aded(), memory) for _ in range(2))
    taught.observe(array([1, 2, 4, 1, 2]))
    assert taught.best_chain(array([1, 2]), 1) == [4]
    assert other.best_chain(array([1, 2]), 1) == drafted


def test_a_full_memory_forgets_what_gained_longest_ago():
    memory = Memory(empty_table(64), Aded(), size=4)
    for text in ([1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3], [10, 11, 12]):
        memory.learn(array(text), 2)
    assert memory.num_learned == 4
    memory.learn(array([13, 14, 15]), 2)
    assert memory.num_learned == 3
    assert memory.successors(1, 2) == [(3, pytest.approx(0.08))]
    assert memory.successors(10, 11) == [(12, pytest.approx(0.04))]
    assert memory.successors(13, 14) == [(15, pytest.approx(0.04))]
    assert not memory.successors(4, 5) and not memory.successors(7, 8)


def test_of_a_text_that_is_more_than_a_memory_the_end_counts():
    memory = Memory(empty_table(64), Aded(), size=10)
    AdaptiveTrigrams(memory.table, memory.options, memory).observe(
        np.arange(60, dtype=np.int32)
    )
    assert memory.num_learned == 5
    assert memory.successors(57, 58) and not memory.successors(52, 53)


@given(
    corpus=st.lists(sequences, max_size=2),
    texts=st.lists(
        st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=30),
        min_size=1,
        max_size=4,
    ),
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=12),
    size=st.integers(2, 40),
    top_k=st.integers(1, 6),
    window=st.integers(3, 20),
)
def test_texts_that_share_a_memory_against_plain_python(
    corpus, texts, turns, size, top_k, window
):
    """Texts grow in turns; weights, order and what is forgotten agree."""
    options = {"top_k": top_k, "window": window, "cap": 1.5, "increment": 0.5}
    table, weights = table_of(*corpus), reference.corpus_weights(corpus)
    memory, plain_memory = Memory(table, Aded(**options), size), reference.Memory(size)
    pairs = [
        (
            AdaptiveTrigrams(table, Aded(**options), memory),
            reference.Drafting(weights, **options, memory=plain_memory),
        )
        for _ in texts
    ]
    lengths = [2] * len(texts)
    for turn, more in [(number, 0) for number in range(len(texts))] + turns:
        turn %= len(texts)
        lengths[turn] = min(lengths[turn] + more, len(texts[turn]))
        text = texts[turn][: lengths[turn]]
        trigrams, plain = pairs[turn]
        trigrams.observe(array(text))
        plain.observe(text)
        assert memory.num_learned == len(plain_memory.gained) <= size
        for first in range(VOCAB):
            for second in range(VOCAB):
                assert memory.successors(first, second) == plain.successors(
                    (first, second)
                )


@given(
    corpus=st.lists(sequences, max_size=4),
    text=st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60),
    steps=st.lists(st.integers(1, 9), max_size=6),
    window=st.integers(3, 20),
    increment=st.sampled_from([0.04, 0.5]),
    depth=st.integers(1, 5),
    top_k=st.integers(1, 6),
    iterations=st.integers(1, 60),
    seed=st.integers(0, 5),
    length=st.integers(1, 10),
)
def test_rounds_of_a_text_against_plain_python(
    corpus, text, steps, window, increment, depth, top_k, iterations, seed, length
):
    options = {
        "window": window,
        "increment": increment,
        "cap": 1.5,
        "depth": depth,
        "top_k": top_k,
        "iterations": iterations,
        "seed": seed,
    }
    trigrams = AdaptiveTrigrams(table_of(*corpus), Aded(**options))
    plain = reference.Drafting(reference.corpus_weights(corpus), **options)
    ends = [end for end in len(text) - np.cumsum(steps[::-1])[::-1] if end >= 2]
    for end in [*ends, len(text)]:
        trigrams.observe(array(text[:end]))
        plain.observe(text[:end])
        chain = trigrams.best_chain(array(text[:end]), length)
        assert chain == plain.best_chain(text[:end], length)
        assert len(chain) <= length
        line = [*text[end - 2 : end], *chain]
        for first, second, third in zip(line, line[1:], line[2:], strict=False):
            successors = dict(trigrams.successors(first, second))
            assert 0 < successors[third] <= 1.5


@pytest.mark.parametrize("top_k", [3, 12])
def test_a_text_of_few_tokens_against_plain_python(top_k: int):
    """Small weights: what the roll-outs find decides as well."""
    text = np.random.default_rng(top_k).integers(0, 12, 400).tolist()
    options = {"increment": 0.003, "top_k": top_k, "iterations": 40, "depth": 3}
    trigrams = AdaptiveTrigrams(empty_table(12), Aded(**options))
    plain = reference.Drafting({}, **options)
    for end in range(100, 400, 3):
        trigrams.observe(array(text[:end]))
        plain.observe(text[:end])
        chain = trigrams.best_chain(array(text[:end]), 6)
        assert chain == plain.best_chain(text[:end], 6)


WITHOUT_NUMBA = """
import sys

sys.modules["numba"] = None
import numpy as np
from vllm_dlm.kernels import numba_jit
from vllm_dlm.spec_decode.aded import drafting, trigram_table
from vllm_dlm.spec_decode.options import Aded

assert numba_jit.numba is None
text = np.random.default_rng(0).integers(0, 9, 200).astype(np.int32)
trigrams = drafting.AdaptiveTrigrams(trigram_table.empty_table(9), Aded())
trigrams.observe(text)
print(trigrams.best_chain(text, 12))
"""


def test_without_numba():
    text = np.random.default_rng(0).integers(0, 9, 200).astype(np.int32)
    trigrams = AdaptiveTrigrams(empty_table(9), Aded())
    trigrams.observe(text)
    output = subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == str(trigrams.best_chain(text, 12))
