# SPDX-License-Identifier: Apache-2.0
"""AttentionRows: a forward's rows of attention, in the form vLLM's backends know."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan


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

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.seq_lens)

    @classmethod
    def of_batch(
        cls, batch: InputBatch, block_tables: tuple[torch.Tensor, ...]
    ) -> AttentionRows:
        """A row for each request: dummy batches, of which no plan is made."""
        count = batch.num_reqs
        return cls(
            batch.query_start_loc[: count + 1],
            torch.from_numpy(batch.query_start_loc_np[: count + 1]),
            int(batch.num_scheduled_tokens.max()),
            batch.seq_lens[:count],
            block_tables,
            causal=False,
        )

    @classmethod
    def of_plan(
        cls,
        plan: SegmentPlan,
        batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
    ) -> AttentionRows:
        """A row for each segment of a plan.

        Args:
            block_tables: [requests of the batch, pages] int32 for each kind of pages.
        """
        segments, device = plan.segments, plan.slots.device
        starts = torch.from_numpy(segments.query_start_loc)

        def on_device(array: np.ndarray) -> torch.Tensor:
            there = torch.from_numpy(array.astype(np.int32))
            return there.to(device, non_blocking=True)

        if len(segments.request) != batch.num_reqs:
            request = torch.from_numpy(segments.request).to(device, non_blocking=True)
            block_tables = tuple(table[request] for table in block_tables)
        if plan.branches is not None:
            # A request with branches has one kind of pages (`scheduler.py`). Its table
            # has been copied above: each of its branches has a row.
            plan.branches.swap_pages(block_tables[0])
        return cls(
            starts.to(device, non_blocking=True),
            starts,
            int(np.diff(segments.query_start_loc).max()),
            on_device(plan.kv_lens_np),
            block_tables,
            causal=False if plan.causal_np is None else on_device(plan.causal_np),
        )
