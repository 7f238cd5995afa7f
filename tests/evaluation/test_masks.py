# SPDX-License-Identifier: Apache-2.0
"""Which positions of a text the samples of its log-likelihood mask."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dlm.evaluation.masks import draw_masks, part_lengths


@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    strata=st.integers(1, 6),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_each_part_is_masked_and_weighted_by_itself(parts, strata, rounds, seed):
    samples = strata * rounds
    rng = np.random.default_rng(seed)
    masks, weights = draw_masks(parts, samples, strata, rng)
    assert masks.shape == weights.shape == (samples, sum(parts))
    start = 0
    for length in parts:
        counts = masks[:, start : start + length].sum(axis=1)
        assert counts.min() >= 1
        expected = (length / counts)[:, None].repeat(length, axis=1)
        np.testing.assert_array_equal(weights[:, start : start + length], expected)
        start += length


@pytest.mark.parametrize("length", [1, 4, 5])
def test_a_round_of_as_many_samples_has_every_number_of_masks_once(length):
    rng = np.random.default_rng(3)
    masks, _ = draw_masks([length], 10 * length, length, rng)
    counts = masks.sum(axis=1).reshape(10, length)
    assert all(sorted(row) == list(range(1, length + 1)) for row in counts.tolist())


@pytest.mark.parametrize("strata", [1, 2, 4, 5])
def test_every_number_and_every_place_is_as_likely(strata):
    """Also where the samples of a round are no multiple of the text's length: with
    other roundings some numbers would come more often."""
    length, samples = 3, 30_000 // strata * strata
    rng = np.random.default_rng(0)
    masks, _ = draw_masks([length], samples, strata, rng)
    for nth in range(strata):
        of_nth = Counter(map(tuple, masks[nth::strata].tolist()))
        draws = samples // strata
        for count in (1, 2, 3):
            ways = list(combinations(range(length), count))
            for way in ways:
                seen = of_nth[tuple(i in way for i in range(length))]
                chance = 1 / length / len(ways)
                spread = (draws * chance * (1 - chance)) ** 0.5
                assert abs(seen - draws * chance) < 5 * spread


@given(
    first=st.integers(1, 40),
    length=st.integers(1, 40),
    block=st.integers(1, 9),
    data=st.data(),
)
def test_blocks_cut_a_text_where_they_end(first, length, block, data):
    origin = data.draw(st.integers(0, min(first, block - 1)))
    numbers = [(first + i - origin) // block for i in range(length)]
    expected = [count for _, count in sorted(Counter(numbers).items())]
    assert part_lengths(first, length, block, origin) == expected
