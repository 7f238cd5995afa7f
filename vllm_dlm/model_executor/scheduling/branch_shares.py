# SPDX-License-Identifier: Apache-2.0
"""How many branches each request's next forward has, and their pages.

A branch is one more canvas that a forward evaluates for a request
(`planning/branches.py`). Branches are made of rows and pages that no other request
wants in a step; requests whose strategy cannot do without them have theirs always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

from vllm_dlm.config.request import RequestConfig
from vllm_dlm.model_executor.layout import GRAPH_SEGMENTS
from vllm_dlm.model_executor.planning.branch_pages import (
    Wish,
    copies_of_pages,
    most_branches,
    share_out,
)
from vllm_dlm.strategies import STRATEGIES

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest


class BranchShares:
    """Hands out branches, step by step.

    Args:
        manager: vLLM's manager of KV pages.
        page_size: tokens in a page.
        max_rows: rows of a forward.
        max_model_len: tokens of a request, prompt and text.
        rows_of_graphs: draft tokens a request for which vLLM replays whole CUDA graphs.
    """

    def __init__(
        self,
        manager: Any,
        *,
        page_size: int,
        max_rows: int,
        max_model_len: int,
        rows_of_graphs: int,
    ) -> None:
        self._manager = manager
        self._page_size = page_size
        self._max_rows = max_rows
        self._longest = max_model_len // page_size
        """Most pages of a request."""
        self._rows_of_graphs = rows_of_graphs

    def most_of(self, config: RequestConfig, params: SamplingParams) -> int:
        """Canvases that one forward of a request may evaluate."""
        # Options that look at every step would miss the steps that branches skip.
        watched = config.eotp != "off" or config.growth != "none"
        watched = watched or params.bad_words_token_ids
        if watched or self._manager.num_kv_cache_groups != 1:
            return 1
        return STRATEGIES[config.strategy].branches(config.params)

    def rows_ahead(self, config: RequestConfig) -> int:
        """Positions behind the active block that a request's forwards compute too.

        They fit into a forward's rows, with the block and the one before.
        """
        length = config.block_length
        room = self._max_rows // length - 2
        return min(config.window - length, max(room, 0) * length)

    def limit(self, request: CanvasRequest) -> None:
        """Let a request that needs its branches have as many as always fit."""
        layout = request.layout
        # vLLM keeps one of them empty.
        pages = min(self._longest, self._manager.block_pool.num_gpu_blocks - 1)
        request.max_branches = most_branches(
            request.max_branches,
            length=layout.widest_step,
            end=layout.text_end,
            from_start=layout.widest_step == layout.text_end,
            rows=self._max_rows,
            longest=pages,
            page_size=self._page_size,
        )

    def hand_out(
        self, running: Sequence[CanvasRequest], next_ones: Sequence[CanvasRequest]
    ) -> None:
        """Give drafts the rows and pages that no other request wants in this step.

        Args:
            running: the requests that run.
            next_ones: those that may be admitted in this step.
        """
        running = [one for one in running if not one.sits_out]
        if all(request.useful_branches() == 1 for request in running):
            return
        requests = [*running, *next_ones]
        wishes = []
        for request in requests:
            start, end = request.planned_rows()
            held = len(self._manager.get_block_ids(request.request_id)[0])
            branches, seen = request.useful_branches(), request.keys_end(end)
            least = branches if request.needs_branches else 1
            wishes.append(Wish(branches, held, start, end, seen, least))
        shares = share_out(
            wishes,
            rows=self._max_rows,
            pages=self._manager.block_pool.get_num_free_blocks(),
            longest=self._longest,
            page_size=self._page_size,
        )
        for request, wish, branches in zip(requests, wishes, shares, strict=True):
            rows = branches * (wish.end - wish.start)
            if branches > GRAPH_SEGMENTS and rows == self._rows_of_graphs:
                # vLLM would replay a whole CUDA graph, which has fewer segments. One
                # more without a draft is the canvas once more, and changes nothing.
                branches += 1 if request.needs_branches else -1
            if branches > 1:
                request.take_branches(branches)

    def settle(
        self, output: SchedulerOutput, request: CanvasRequest, start: int, num_rows: int
    ) -> int:
        """Tell the worker how many branches a scheduled request has.

        Fewer than were handed out, if vLLM had to cut the request's rows.

        Args:
            output: of this step; changed in place.
            start: first row of the request.
            num_rows: rows of all its branches.

        Returns:
            The number of branches; 1 for a request that has none but its canvas.
        """
        if request.branches == 1:
            return 1
        branches = num_rows // request.branch_rows
        request_id, end = request.request_id, start + request.branch_rows
        (ids,) = self._manager.get_block_ids(request_id)
        seen = request.keys_end(end)
        copies = [
            KVCacheBlockCopy(*copy)
            for copy in copies_of_pages(
                ids, branches, start, end, seen, self._page_size
            )
        ]
        output.kv_cache_block_copies = (output.kv_cache_block_copies or []) + copies
        # The worker reads how many branches there are off the number of draft tokens.
        # It has the tokens themselves.
        output.scheduled_spec_decode_tokens[request_id] = [-1] * (branches - 1)
        return branches
