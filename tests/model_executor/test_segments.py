# SPDX-License-Identifier: Apache-2.0
"""Rows cut into segments, by hand: who sees what in a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from vllm_dlm.config.model import Attention
from vllm_dlm.model_executor.planning.segments import Segments, cut_segments


@dataclass(frozen=True)
class Asked:
    """One request's rows of a forward."""

    start: int
    end: int
    first_block: int
    """Start of the block that was active at admission."""
    length: int = 4
    origin: int = 0


def cut(attention: Attention, *asked: Asked) -> Segments:
    def column(name: str) -> Any:
        return np.array([getattr(one, name) for one in asked])

    return cut_segments(
        attention,
        starts=column("start"),
        ends=column("end"),
        block_lengths=column("length"),
        origins=column("origin"),
        first_blocks=column("first_block"),
    )


def bounds(segments: Segments, start: int) -> list[tuple[int, int]]:
    """First position and key length of each segment of a request alone."""
    starts = segments.query_start_loc[:-1] + start
    # Without a cache, keys end where a segment's own rows do.
    assert (segments.query_start_loc[1:] + start).tolist() == segments.kv_lens.tolist()
    assert set(segments.request.tolist()) == {0}
    return list(zip(starts.tolist(), segments.kv_lens.tolist(), strict=True))


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        pytest.param(Asked(0, 4, 0), [(0, 4)], id="prompt shorter than a block"),
        pytest.param(Asked(0, 12, 8), [(0, 4), (4, 8), (8, 12)], id="first step"),
        pytest.param(Asked(8, 12, 8), [(8, 12)], id="inner step"),
        pytest.param(Asked(8, 16, 8), [(8, 12), (12, 16)], id="next block"),
        pytest.param(Asked(8, 14, 8), [(8, 12), (12, 14)], id="last block is cut"),
        pytest.param(Asked(12, 13, 8), [(12, 13)], id="a block of one position"),
        pytest.param(Asked(0, 8, 12), [(0, 4), (4, 8)], id="chunk"),
        pytest.param(Asked(32, 44, 40), [(32, 36), (36, 40), (40, 44)], id="found"),
        pytest.param(Asked(4, 8, 8), [(4, 8)], id="seed"),
        # Blocks counted from the end of a prompt of 7: the very first has 3 positions.
        pytest.param(
            Asked(0, 11, 7, origin=3), [(0, 3), (3, 7), (7, 11)], id="from the prompt"
        ),
        pytest.param(Asked(3, 11, 7, origin=3), [(3, 7), (7, 11)], id="second chunk"),
        pytest.param(Asked(7, 15, 7, origin=3), [(7, 11), (11, 15)], id="its next"),
        pytest.param(Asked(0, 7, 3, origin=3), [(0, 3), (3, 7)], id="short prompt"),
    ],
)
def test_block_causal(asked: Asked, wanted: list[tuple[int, int]]):
    segments = cut("block", asked)
    assert bounds(segments, asked.start) == wanted


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        # Blocks counted from the end of a prompt of 10.
        pytest.param(Asked(0, 14, 10, origin=2), [(0, 10), (10, 14)], id="first"),
        pytest.param(Asked(10, 14, 10, origin=2), [(10, 14)], id="inner"),
        pytest.param(Asked(10, 18, 10, origin=2), [(10, 14), (14, 18)], id="next"),
        pytest.param(Asked(10, 16, 10, origin=2), [(10, 14), (14, 16)], id="cut"),
        # Not cut at block ends: it is causal anyway.
        pytest.param(Asked(0, 6, 10, origin=2), [(0, 6)], id="chunk"),
        pytest.param(Asked(6, 14, 10, origin=2), [(6, 10), (10, 14)], id="last"),
        pytest.param(Asked(0, 7, 3, origin=3), [(0, 3), (3, 7)], id="short"),
        pytest.param(Asked(0, 8, 4, origin=0), [(0, 4), (4, 8)], id="one block"),
    ],
)
def test_causal_context(asked: Asked, wanted: list[tuple[int, int]]):
    """One segment for all that was known at admission: it is causal anyway."""
    assert bounds(cut("causal", asked), asked.start) == wanted


def test_full_attention_is_one_segment_per_request():
    segments = cut("full", Asked(0, 48, 16), Asked(32, 40, 32, length=8))
    assert segments.request.tolist() == [0, 1]
    assert segments.query_start_loc.tolist() == [0, 48, 56]
    assert segments.kv_lens.tolist() == [48, 40]
    assert segments.is_last.all()


def test_segments_of_a_batch_keep_the_order_of_its_rows():
    """A first step, a chunk that decides nothing, an inner step, a next block."""
    segments = cut(
        "block",
        Asked(0, 10, 8),
        Asked(16, 32, 64, length=8),
        Asked(12, 16, 8),
        Asked(5, 13, 5, origin=1),
    )
    assert segments.request.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert segments.query_start_loc.tolist() == [0, 4, 8, 10, 18, 26, 30, 34, 38]
    assert segments.kv_lens.tolist() == [4, 8, 10, 24, 32, 16, 9, 13]
    for array in (segments.query_start_loc, segments.kv_lens):
        assert array.dtype == np.int32  # what attention kernels take


def test_the_last_segment_of_each_request_is_known():
    segments = cut(
        "causal",
        Asked(0, 12, 8),
        Asked(0, 16, 40),
        Asked(8, 12, 8),
    )
    assert segments.request.tolist() == [0, 0, 1, 2]
    assert segments.query_start_loc.tolist() == [0, 8, 12, 28, 32]
    assert segments.is_last.tolist() == [False, True, True, True]


def test_branches_repeat_all_segments_of_their_request():
    """A request that looks ahead computes finished text and several blocks."""
    segments = cut("block", Asked(4, 16, 0), Asked(8, 10, 0)).repeated(np.array([2, 1]))
    assert segments.request.tolist() == [0] * 6 + [1]
    assert segments.query_start_loc.tolist() == [0, 4, 8, 12, 16, 20, 24, 26]
    assert segments.kv_lens.tolist() == [8, 12, 16, 8, 12, 16, 10]
    assert segments.is_last.tolist() == [False, False, True] * 2 + [True]
