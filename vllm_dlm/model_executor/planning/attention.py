# SPDX-License-Identifier: Apache-2.0
"""A forward's rows of attention, in the form and at the addresses that vLLM knows.

vLLM's backends are given numbers for each row of attention, and each row's pages. A
CUDA graph replays kernels on the addresses of its capture, so these tensors lie in the
same place in every step. One block of int32 holds all numbers, and is sent at once:

    starts      0   16   32   32   32      where each row's queries begin; the end
    keys       64   96    0    0           keys that each row sees
    causal      0    0    0    0           which rows are causal
    request     0    1    0    0           whose pages each row reads

Here two requests compute a block of 16 each, in a graph with four rows of attention:
the unused ones stand behind the others, and have no queries and no keys.

A whole CUDA graph is replayed for every batch with its number of requests and of
positions. A request whose blocks are half as long computes as many positions when it
computes two of its blocks, and these are two rows of attention. So a graph has
`GRAPH_SEGMENTS` of them for each request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_dlm.model_executor.layout import GRAPH_SEGMENTS

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan

WITH_EMPTY_ROWS = {"FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"}
"""Backends of vLLM whose kernels take rows of attention of unequal lengths, empty ones
among them, in a whole graph: by their source. (FlashInfer's take a request for a row,
all of them equally long. A CPU has no graphs, as its backend says itself.)"""

_STARTS, _KEYS, _CAUSAL, _REQUEST = range(4)
_ALIGNED = 4
"""Numbers: kernels may read 16 bytes at a time."""


class AttentionRows(NamedTuple):
    """S rows of attention: query ranges, numbers of keys, pages."""

    query_start_loc: torch.Tensor
    """[S + 1] int32: where each row's queries begin in the batch."""
    query_start_loc_cpu: torch.Tensor
    """The same on the host."""
    max_query_len: int
    seq_lens: torch.Tensor
    """[S] int32: keys that each row sees."""
    block_tables: tuple[torch.Tensor, ...]
    """[S, pages] int32 for each kind of pages."""
    causal: bool | torch.Tensor
    """[S] int32: which rows are causal; False for none."""
    extras: ModelSpecificAttnMetadata | None
    """What backends are told beside the rows."""

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.seq_lens)


class Unscheduled(ModelSpecificAttnMetadata):
    """Has a backend build its metadata without a schedule made ahead of the kernel.

    FlashAttention 3 keeps that schedule in a buffer for as many rows of attention as
    the server has requests, or as its largest graph has tokens. A forward of prompts
    may have more rows: one for each block.
    """

    def get_extra_attn_kwargs(
        self, attn_metadata_builder: Any, num_reqs: int
    ) -> dict[str, Any]:
        """Arguments of `AttentionMetadataBuilder.build`."""
        return {"fast_build": True}


class _Numbers:
    """The four arrays of the module's docstring, on the host and on the device.

    Args:
        num_rows: of attention, at most.
        steps: that may be planned before the copy of the first one is done.
    """

    def __init__(self, num_rows: int, device: torch.device, *, steps: int = 1) -> None:
        width = -(-(num_rows + 1) // _ALIGNED) * _ALIGNED
        pinned = device.type == "cuda"
        self._hosts = deque(
            torch.zeros(4, width, dtype=torch.int32, pin_memory=pinned)
            for _ in range(steps)
        )
        self.host = self._hosts[0]
        self.device = torch.zeros(4, width, dtype=torch.int32, device=device)

    def send(
        self,
        starts: np.ndarray,
        keys: np.ndarray,
        causal: np.ndarray | None,
        request: np.ndarray,
    ) -> None:
        """Write S rows, empty ones behind them, and copy all to the device.

        Args:
            starts: [S + 1].
            keys, causal, request: [S]; without `causal`, no row is.
        """
        self._hosts.rotate()
        self.host, count = self._hosts[0], len(keys)
        block = self.host.numpy()
        block[:, count:] = 0
        block[_STARTS, : count + 1] = starts
        block[_STARTS, count + 1 :] = starts[-1]
        block[_KEYS, :count] = keys
        block[_CAUSAL, :count] = 0 if causal is None else causal
        block[_REQUEST, :count] = request
        self.device.copy_(self.host, non_blocking=True)


class AttentionBuffers:
    """Where the rows of attention of every forward lie.

    A forward with more rows than whole graphs have, as with a long prompt, gets tensors
    of its own.

    Args:
        max_num_reqs: requests that can be served at a time.
        has_causal_rows: whether some rows of the model's attention are causal.
    """

    def __init__(
        self, max_num_reqs: int, device: torch.device, *, has_causal_rows: bool
    ) -> None:
        self._device = device
        self._has_causal_rows = has_causal_rows
        self._max_num_reqs = max_num_reqs
        self._capacity = GRAPH_SEGMENTS * max_num_reqs
        self._numbers = _Numbers(self._capacity, device, steps=2)
        self._tables: tuple[torch.Tensor, ...] = ()

    def allocate_tables(self, tables: Sequence[torch.Tensor]) -> None:
        """Make room for pages, before vLLM captures graphs on them.

        Args:
            tables: vLLM's, [requests, pages] int32 for each kind of pages.
        """
        self._tables = tuple(
            table.new_zeros(self._capacity, table.shape[1]) for table in tables
        )

    def fill(
        self,
        plan: SegmentPlan | None,
        batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        *,
        is_whole: bool,
    ) -> AttentionRows:
        """Write the rows of attention of a forward, in place.

        Args:
            plan: of the forward; None for a dummy batch, in which each request is a
                row.
            block_tables: [requests of the batch, pages] int32 for each kind of pages.
            is_whole: the forward is a whole CUDA graph, captured now or replayed: it
                has rows for as many requests as the batch is padded to.
        """
        if plan is None:
            count = batch.num_reqs
            starts, request = batch.query_start_loc_np[: count + 1], np.arange(count)
            keys, causal = batch.seq_lens_cpu_upper_bound.numpy()[:count], None
        else:
            starts, request = plan.segments.query_start_loc, plan.segments.request
            keys, causal = plan.kv_lens_np, plan.causal_np
        num_rows, longest = len(keys), int(np.diff(starts).max())
        if is_whole:
            num_rows = GRAPH_SEGMENTS * batch.num_reqs_after_padding
            # What the graph was captured with: rows may be halves of it.
            longest = int(batch.num_scheduled_tokens.max())
            if len(keys) > num_rows:
                raise RuntimeError(
                    f"{len(keys)} segments do not fit into a CUDA graph that has "
                    f"{num_rows} rows of attention"
                )
        fits = num_rows <= self._capacity
        numbers = self._numbers if fits else _Numbers(num_rows, self._device)
        numbers.send(starts, keys, causal, request)
        if plan is not None and plan.guessed_left is not None:
            numbers.device[_CAUSAL].index_copy_(0, *plan.guessed_left)
        owners = numbers.device[_REQUEST, :num_rows]
        if fits:
            tables = tuple(
                torch.index_select(table, 0, owners, out=own[:num_rows])
                for table, own in zip(block_tables, self._tables, strict=True)
            )
        else:
            tables = tuple(table[owners] for table in block_tables)
        if plan is not None and plan.branches is not None:
            # A request with branches has one kind of pages (`scheduler.py`), and a row
            # for each of its branches.
            plan.branches.swap_pages(tables[0])
        is_scheduled = is_whole or num_rows <= self._max_num_reqs
        return AttentionRows(
            numbers.device[_STARTS, : num_rows + 1],
            numbers.host[_STARTS, : num_rows + 1],
            longest,
            numbers.device[_KEYS, :num_rows],
            tables,
            numbers.device[_CAUSAL, :num_rows] if self._has_causal_rows else False,
            None if is_scheduled else Unscheduled(),
        )
