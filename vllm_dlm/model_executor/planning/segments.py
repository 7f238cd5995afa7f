# SPDX-License-Identifier: Apache-2.0
"""Segments: what one forward computes and sees.

vLLM's attention backends know query ranges, key lengths and block tables, nothing of
requests. A forward of a diffusion model is therefore described as a list of segments,
each one row of **non-causal** attention: a query range and how many keys it sees. KV
is written before attention runs, so a segment sees the keys of the whole forward.

    full, no cache         |prompt ........ canvas ........|   one segment, keys = all
    full, dual cache               |block|                     keys reach past the query
    block, first step      |block|block|block|tail+masks|      one segment per block,
    block, next block                  |final|new block|       keys = up to its end
    block, inner step                        |new block|
    causal                 |causal prompt ...|new block|       as block, the rest causal

Segments of one request share its row of the block table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dlm.config.model import Attention


@dataclass(frozen=True)
class Segments:
    """Rows of attention of one forward; S segments of a batch, all arrays on the host.

    A request's segments follow each other, so that the batch's rows keep their order.
    """

    request: np.ndarray
    """[S] int64: index in the batch of the request that a segment belongs to."""
    query_start_loc: np.ndarray
    """[S + 1] int32: where each segment's query rows begin in the batch."""
    kv_lens: np.ndarray
    """[S] int32: keys each segment attends to, counted from position 0."""
    is_last: np.ndarray
    """[S] bool: the last one of its request, or of a branch of it."""

    def repeated(self, branches: np.ndarray) -> Segments:
        """These segments, those of each request several times over: branches.

        Args:
            branches: [requests]: how often, one behind the other.
        """
        if branches.max(initial=1) == 1:
            return self
        counts = np.bincount(self.request, minlength=len(branches))
        first = np.cumsum(counts) - counts
        request, place = ragged(counts * branches)
        copied = first[request] + place % counts[request]
        return Segments(
            request,
            _starts_of(np.diff(self.query_start_loc)[copied]),
            self.kv_lens[copied],
            self.is_last[copied],
        )


def cut_segments(
    attention: Attention,
    starts: np.ndarray,
    ends: np.ndarray,
    block_lengths: np.ndarray,
    origins: np.ndarray,
    first_blocks: np.ndarray,
) -> Segments:
    """Cut each request's rows [start, end) into segments.

    Args:
        starts, ends: [R] absolute positions of the rows to compute.
        block_lengths: [R] B of each request.
        origins: [R] positions from which blocks are counted.
        first_blocks: [R] start of the block that was active at admission.
    """
    request = np.arange(len(starts))
    lengths = ends - starts
    if attention == "full":
        one = np.ones(len(starts), dtype=bool)
        return Segments(request, _starts_of(lengths), ends.astype(np.int32), one)
    first = (starts - origins) // block_lengths
    if attention == "causal":
        # One causal segment holds all that was known at admission.
        first = np.maximum(first, (first_blocks - origins) // block_lengths - 1)
    counts = np.maximum(-((origins - ends) // block_lengths) - first, 1)
    request, nth = ragged(counts)
    bounds = origins[request] + (first[request] + nth + 1) * block_lengths[request]
    segment_ends = np.minimum(bounds, ends[request])
    segment_starts = np.where(
        nth == 0, starts[request], bounds - block_lengths[request]
    )
    return Segments(
        request,
        _starts_of(segment_ends - segment_starts),
        segment_ends.astype(np.int32),
        np.append(request[1:] != request[:-1], True),
    )


def ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner, and place in the owner's row, of each entry of rows of these lengths."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    first = np.cumsum(lengths) - lengths
    return owner, np.arange(len(owner)) - first[owner]


def _starts_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
