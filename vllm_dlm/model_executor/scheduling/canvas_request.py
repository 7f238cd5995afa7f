# SPDX-License-Identifier: Apache-2.0
"""CanvasRequest: a vLLM request that counts blocks, a canvas, and rows to compute.

Text is decoded in blocks of B positions, counted from `origin`: from position 0 where
the model was trained so (class B: the prompt's last tokens may share the first block),
from the prompt's end otherwise. The **canvas** ends where the request's text may end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from vllm_dlm.config.cache import Reach
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.request import RequestConfig
from vllm_dlm.config.tccf import Stages, one_at_a_time
from vllm_dlm.model_executor.layout import (
    Rows,
    block_start,
    canvas_width,
    part_rows,
    plan_rows,
    text_end,
)
from vllm_dlm.model_executor.planning.branches import Pages, page_size_of
from vllm_dlm.model_executor.step_maps import StepCount
from vllm_dlm.vllm_objects import replace


class CanvasRequest(Request):
    """A vLLM request with a canvas; made of one by `DiffusionStepScheduler`."""

    dlm: RequestConfig
    model: ModelDefaults
    stages: Stages | None
    """What is left of `tccf`; None without it, and in its second stage."""
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
    cache_salt: Any
    """vLLM's: requests share pages only if theirs are the same. A text or None, which
    the client gives, or in the second stage of `tccf` what no client can give."""
    block_hashes: list[Any]
    """vLLM's: of its full pages."""
    steps: StepCount
    """Its denoise steps."""
    reach: Reach
    """Its cache policy; of class A."""
    frontiers: list[int]
    """Its tokens after each step of the active block, from before the first one on.
    Kept when it is preempted: a replay computes the same rows again."""
    last_step: int
    """The scheduler's step that it last took part in; -1 for none."""
    allotted: int
    """Rows of it that the next step may compute; of a running request."""
    commits_alone: bool
    """A finished block's KV is written by a forward of its own."""
    max_branches: int
    """Canvases that a forward of its may evaluate (`branches.py`)."""
    branches: int
    """Canvases that its next forward evaluates."""
    branch_rows: int
    """Rows of each of them, if there are several."""
    drafted_block: int
    """Start of the block that the last forward has left drafts of; -1 for none."""

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

    @property
    def step(self) -> int:
        """Denoise steps that the active block has had."""
        return self.steps.in_block if self.steps.block == self.block_start else 0

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

    def enter_second_stage(self, max_canvas: int, max_model_len: int) -> None:
        """From now on one token at a time, as `tccf` says; then it must be preempted.

        Pages that blocks of one have filled are no others' pages.
        """
        self.stages = None
        self.dlm = one_at_a_time(self.dlm)
        self.origin = self.model.origin(self.num_prompt_tokens, 1)
        self.cache_salt = ("blocks of 1", self.cache_salt)
        self.block_hashes = []
        self.update_block_hashes()
        self.open_canvas(max_canvas, max_model_len)

    def begin(self) -> None:
        """Forget what was computed: a new request, or one that was preempted."""
        self.refreshed_block = self.drafted_block = -1
        self.branches = 1
        self.first_block = self.block_start
        self.steps.enter(self.first_block)
        # A replay does not repeat a block's seed, if it was handed out.
        seeded = self.model.begins_with_seed(
            self.first_block, self.num_prompt_tokens
        ) and (len(self._all_token_ids) > self.first_block)
        self.steps.in_block, self.steps.joined = int(seeded), 0
        if self.frontiers[0] != self.first_block:
            self.frontiers = [self.first_block]
        self.kv_final = 0
        self.rows_end = self.next_rows().end

    def next_rows(self) -> Rows:
        """Rows that its next forward computes."""
        block, length = self.block_start, self.dlm.block_length
        if not self.model.reuses_blocks:
            step = self.step
            return plan_rows(
                self.reach,
                step=step,
                is_first_block=block <= self.num_prompt_tokens,
                block_start=block,
                block_length=length,
                frontiers=(self.frontiers[max(step - 1, 0)], self.frontiers[step]),
                canvas_end=self.canvas_end,
            )
        is_new = self.step == 0 and len(self._all_token_ids) == block
        if self.model.seeds_blocks and is_new:
            # The rows left of the block, finished now, predict its first token. It is
            # not repeated where they predict the mask id (`reference_exact`).
            return Rows(self.kv_final, block)
        if self.commits_alone and self.kv_final < block != self.first_block:
            return Rows(self.kv_final, block)
        # What is finished but not final (the block before this one, or the prompt)
        # and the block itself: no forward is spent on writing final KV alone.
        end = min(block + length, self.canvas_end)
        step = self.step
        if step <= self.model.begins_with_seed(block, self.num_prompt_tokens):
            return Rows(self.kv_final, end)
        # In a replay, fewer tokens than are known were there before this step.
        frontier = len(self._all_token_ids)
        if step < len(self.frontiers):
            frontier = self.frontiers[step]
        return part_rows(
            self.reach, block_start=block, block_end=end, frontier=frontier
        )

    def note_step(self) -> None:
        """A denoise step is over; its tokens are not appended yet."""
        self.steps.enter(self.block_start)
        self.steps.in_block += 1

    def note_frontier(self) -> None:
        """The tokens of a denoise step have been appended."""
        if self.frontiers[0] != self.block_start:
            self.frontiers = [self.block_start]
        elif self.step == len(self.frontiers):
            self.frontiers.append(len(self._all_token_ids))

    def useful_branches(self) -> int:
        """Canvases that its next forward can learn from; 1 where nothing is drafted."""
        block = self.block_start
        if self.drafted_block != block:
            return 1
        block_end = min(block + self.dlm.block_length, self.canvas_end)
        # One for each token that is missing: masks, as far as is known here.
        return max(min(self.max_branches, block_end - len(self._all_token_ids)), 1)

    def take_branches(self, count: int) -> None:
        """Have the next forward evaluate several canvases."""
        start, end = self.next_rows()
        self.branches, self.branch_rows = count, end - start
        self.rows_end = start + count * self.branch_rows

    def whole_rows(self, start: int, end: int) -> int:
        """How many of the rows [start, end) one forward may compute.

        Rows of a full-attention model are computed together or not at all, as are
        those of a branch. Others may compute a prompt in chunks, which end where a
        block ends.
        """
        if end == self.rows_end:
            return end - start
        if self.branches > 1:
            return (end - start) // self.branch_rows * self.branch_rows
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
        self.drafted_block = block if end > block else -1
        if not self.model.reuses_blocks:
            return end - max(start, self.num_prompt_tokens)
        self.kv_final = min(end, block)
        if end > block:
            return end - max(block, start, self.num_prompt_tokens)
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

    vLLM publishes pages as far as a request's tokens go: where it allocates them, and
    in some versions once more when tokens were appended. But the tokens of a waiting
    request count its first block, those of the active block are not final, and those
    of a block that was finished just now have KV that was computed with masks in it.
    So `publish` alone publishes; whatever vLLM calls for that does nothing.
    """

    _publishes: bool
    """Whether `publish` is at work."""

    @classmethod
    def take_over(cls, manager: KVCacheManager) -> None:
        """Make a manager that vLLM has built one of this class."""
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager._publishes = False
        # All of vLLM's ways to publish end here: in the managers of each kind of page.
        for pages in manager.coordinator.single_type_managers:
            replace(pages, "cache_blocks", manager._unless_vllm_calls(pages))

    def _unless_vllm_calls(self, pages: Any) -> Callable[..., None]:
        publish = pages.cache_blocks

        def cache_blocks(*args: Any, **kwargs: Any) -> None:
            if self._publishes:
                publish(*args, **kwargs)

        return cache_blocks

    def publish(self, request: CanvasRequest, end: int) -> None:
        """Let others find the full pages of a request's positions left of `end`.

        Args:
            end: up to there, KV is computed by now, or will be by the next forward;
                what is in or behind the active block is left out in any case.
        """
        self._publishes = True
        try:
            self.cache_blocks(request, min(end, request.block_start))
        finally:
            self._publishes = False

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As vLLM's, but for what is published, and with pages for branches."""
        assert isinstance(request, CanvasRequest)
        start = request.num_computed_tokens + num_new_computed_tokens
        if request.branches > 1:
            rows = request.branch_rows
            page_size = page_size_of(self.kv_cache_config)
            pages = Pages.of(start, start + rows, page_size)
            end = pages.with_branches(num_new_tokens // rows) * page_size
            kwargs["num_lookahead_tokens"] = end - start - rows
            num_new_tokens = rows
        blocks = super().allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )
        # Whoever runs may yet be preempted, by one of higher priority, before this
        # forward computes anything: the scheduler publishes its pages at the end.
        if blocks is not None and request.status != RequestStatus.RUNNING:
            self.publish(request, start + num_new_tokens)
        return blocks
