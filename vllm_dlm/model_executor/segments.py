# SPDX-License-Identifier: Apache-2.0
"""SegmentPlan: what one forward computes and sees.

vLLM's attention backends know query ranges, key lengths and block tables, nothing of
requests. A forward of a diffusion model is therefore described as a list of segments,
each one row of **non-causal** attention: a query range and how many keys it sees. KV
is written before attention runs, so a segment sees the keys of the whole forward.

    class A, no cache      |prompt ........ canvas ........|   one segment, keys = all
    class A, dual cache            |block|                     keys reach past the query

For class A a request is one segment, so block tables need no gathering.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SegmentPlan:
    """One forward of a batch; R requests, one segment each, B logits rows per request.

    All tensors but `query_start_loc_cpu` are on the engine's device.
    """

    slots: torch.Tensor
    """[R] int64: state slot of each request."""
    slots_cpu: list[int]
    """The same on the host, for grouping requests by strategy."""
    query_start_loc: torch.Tensor
    """[R + 1] int32: where each segment's query rows begin in the batch."""
    query_start_loc_cpu: torch.Tensor
    """The same on the host."""
    max_query_len: int
    """Rows of the longest segment."""
    start: torch.Tensor
    """[R] int64: absolute position of each segment's first query row."""
    kv_lens: torch.Tensor
    """[R] int32: keys each segment attends to, counted from position 0."""
    positions: torch.Tensor
    """[R, B] int64: absolute positions of the active blocks."""
    valid: torch.Tensor
    """[R, B] bool: False past the block or the canvas."""
    logits_rows: torch.Tensor
    """[R * B] int64: rows of the forward that go through lm_head."""
