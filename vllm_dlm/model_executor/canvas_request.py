# SPDX-License-Identifier: Apache-2.0
"""CanvasRequest: a vLLM request that counts blocks, a canvas, and rows to compute.

Text is decoded in blocks of B positions, counted from `origin`: from position 0 where
the model was trained so (class B: the prompt's last tokens may share the first block),
from the prompt's end otherwise. The **canvas** ends where the request's text may end.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from vllm_dlm.model_defaults import ModelDefaults
from vllm_dlm.model_executor.cache import (
    Rows,
    block_start,
    canvas_width,
    plan_rows,
    text_end,
)
from vllm_dlm.request_config import RequestConfig


class CanvasRequest(Request):
    """A vLLM request with a canvas; made of one by `DiffusionStepScheduler`."""

    dlm: RequestConfig
    model: ModelDefaults
    stop_ids: frozenset[int]
    """Token ids that end the text."""
    origin: int
    """Absolute position from which blocks are counted."""
    canvas_end: int
    """Absolute position one past the canvas' last token."""
    block_canvas_end: int
    """`canvas_end` when the active block began: where a replay of it starts from."""
    refreshed_block: int
    """Start of the block whose surroundings the KV pages hold; -1 for none."""
    first_block: int
    """Start of the block that was active when the request was (re-)admitted."""
    kv_final: int
    """Leading positions whose KV never changes again; 0 in class A."""
    rows_end: int
    """One past the last position of the rows to compute next."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far; while waiting, all rows that its first forward computes."""
        if self.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self.rows_end
        return len(self._all_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        """What vLLM schedules up to."""
        return self.rows_end

    @property
    def block_start(self) -> int:
        """Absolute position of the active block's first token."""
        length = self.dlm.block_length
        return block_start(len(self._all_token_ids), length, self.origin)

    def open_canvas(self, max_canvas: int, max_model_len: int) -> None:
        """Lay out the canvas for (the rest of) the output.

        The references denoise whole blocks and cut afterwards: it ends with a block,
        unless the context ends first. In class A, where it is computed whole, it is at
        most `max_canvas` wide, and a further one may follow.
        """
        length = self.dlm.block_length
        end = self.num_prompt_tokens + self.max_tokens
        if self.model.reuses_blocks:
            end = text_end(end, length, self.origin)
        else:
            begin = len(self._all_token_ids)
            end = begin + canvas_width(end - begin, length, max_canvas)
        self.canvas_end = self.block_canvas_end = min(end, max_model_len)

    def begin(self) -> None:
        """Forget what was computed: a new request, or one that was preempted."""
        self.refreshed_block = -1
        self.first_block = self.block_start
        self.kv_final = 0
        self.rows_end = self.next_rows().end

    def next_rows(self) -> Rows:
        """Rows that its next forward computes."""
        block, length = self.block_start, self.dlm.block_length
        if not self.model.reuses_blocks:
            return plan_rows(
                self.dlm.cache,
                self.refreshed_block != block,
                block,
                length,
                self.canvas_end,
                self.model.shift,
            )
        if self.model.seeds_blocks and len(self._all_token_ids) == block:
            # The rows left of the block, finished now, predict its first token.
            return Rows(self.kv_final, block)
        # What is finished but not final (the block before this one, or the prompt)
        # and the block itself: no forward is spent on writing final KV alone.
        return Rows(self.kv_final, min(block + length, self.canvas_end))

    def whole_rows(self, start: int, end: int) -> int:
        """How many of the rows [start, end) one forward may compute.

        Rows of a full-attention model are computed together or not at all. Others
        may compute a prompt in chunks, which end where a block ends.
        """
        if end == self.rows_end:
            return end - start
        block = self.block_start
        if not self.model.reuses_blocks or block != self.first_block:
            return 0
        cut = block_start(end, self.dlm.block_length, self.origin)
        return max(min(cut, block) - start, 0)

    def computed(self, start: int, end: int) -> int:
        """Note that rows [start, end) are being computed; how many of them are canvas.

        0 says that the forward decides nothing: it computes a part of the prompt.
        """
        block = self.block_start
        self.refreshed_block = block
        if not self.model.reuses_blocks:
            return end - max(start, self.num_prompt_tokens)
        self.kv_final = min(end, block)
        if end > block:
            return end - max(block, self.num_prompt_tokens)
        seeds = self.model.seeds_blocks and len(self._all_token_ids) == end
        return int(seeds)

    def num_tokens_to_stop(self, tokens: list[int]) -> int:
        """How many of the tokens that follow the output belong to the text."""
        for count, token in enumerate(tokens, start=1):
            if token in self.stop_ids:
                return count
        return len(tokens)


class FinalBlocksKVCacheManager(KVCacheManager):
    """Publishes a page for prefix caching once its KV is final, not before.

    vLLM publishes pages as far as a request's tokens go. The tokens of a waiting
    request count its first block, and those of the active block are not final.
    """

    def allocate_slots(
        self, request: Request, num_new_tokens: int, **kwargs: Any
    ) -> Any:
        """As vLLM's, but for what is published."""
        assert isinstance(request, CanvasRequest)
        kwargs["delay_cache_blocks"] = True
        blocks = super().allocate_slots(request, num_new_tokens, **kwargs)
        # Whoever runs may yet be preempted, by one of higher priority, before this
        # forward computes anything: the scheduler publishes its pages at the end.
        if blocks is not None and request.status != RequestStatus.RUNNING:
            found = kwargs.get("num_new_computed_tokens", 0)
            end = request.num_computed_tokens + found + num_new_tokens
            self.cache_blocks(request, min(end, request.block_start))
        return blocks
