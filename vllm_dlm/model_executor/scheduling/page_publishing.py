# SPDX-License-Identifier: Apache-2.0
"""Which pages of a request may be shared with others, and when (prefix caching)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import RequestStatus

from vllm_dlm.model_executor.planning.branch_pages import Pages, page_size_of
from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


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
        """Change the class of a manager that vLLM has built to this one."""
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager._publishes = False
        # All of vLLM's ways to publish end here: in the managers of each kind of page.
        for pages in manager.coordinator.single_type_managers:
            replace(pages, "cache_blocks", manager._unless_vllm_calls(pages))

    def _unless_vllm_calls(
        self, pages: SingleTypeKVCacheManager
    ) -> Callable[..., None]:
        publish = pages.cache_blocks

        def cache_blocks(*args: Any, **kwargs: Any) -> None:
            if self._publishes:
                publish(*args, **kwargs)

        return cache_blocks

    def publish(self, request: CanvasRequest, end: int) -> None:
        """Let others find the full pages of a request's positions left of `end`.

        Args:
            request: whose pages are published, but for those that hold a position in or
                behind its active block.
            end: position up to which KV is computed by now, or will be by the next
                forward.
        """
        self._publishes = True
        try:
            # What the request has written before its first block has no hash yet.
            known = len(request._all_token_ids)
            self.cache_blocks(request, min(end, request.block_start, known))
        finally:
            self._publishes = False

    def get_computed_blocks(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Look for pages as vLLM does, but for those that reach into the first block
        that the request will decide."""
        assert isinstance(request, CanvasRequest)
        request.is_looked_up = True
        try:
            return super().get_computed_blocks(request, *args, **kwargs)
        finally:
            request.is_looked_up = False

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> KVCacheBlocks | None:
        """Allocate pages as vLLM does, and scratch pages for branches.

        The pages of a request that is being admitted are published here.
        """
        assert isinstance(request, CanvasRequest)
        start = request.num_computed_tokens + num_new_computed_tokens
        if request.branches > 1:
            rows = request.branch_rows
            page_size = page_size_of(self.kv_cache_config)
            seen = request.keys_end(start + rows)
            pages = Pages.of(start, start + rows, seen, page_size)
            end = pages.with_branches(num_new_tokens // rows) * page_size
            kwargs["num_lookahead_tokens"] = end - start - rows
            num_new_tokens = rows
        blocks = super().allocate_slots(
            request, num_new_tokens, num_new_computed_tokens, *args, **kwargs
        )
        # A running request may yet be preempted, for one of higher priority, before
        # this forward computes anything: the scheduler publishes its pages at the end.
        if blocks is not None and request.status != RequestStatus.RUNNING:
            self.publish(request, start + num_new_tokens)
        return blocks
