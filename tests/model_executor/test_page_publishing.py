# SPDX-License-Identifier: Apache-2.0
"""Which pages others may find; block attention, blocks of 4."""

from __future__ import annotations

import pytest
import torch
from canvas_requests import PAGE, compute, make_request, write
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request

from vllm_dlm.model_executor.scheduling.page_publishing import FinalBlocksKVCacheManager


def make_manager() -> FinalBlocksKVCacheManager:
    spec = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.float32
    )
    config = KVCacheConfig(
        num_blocks=9,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    manager = KVCacheManager(
        config, max_model_len=64, scheduler_block_size=PAGE, hash_block_size=PAGE
    )
    FinalBlocksKVCacheManager.take_over(manager)
    assert isinstance(manager, FinalBlocksKVCacheManager)
    return manager


def published(manager: KVCacheManager, request: Request) -> int:
    """Tokens of its pages that can be found."""
    hits, count, _ = manager.coordinator.find_longest_cache_hit(
        request.block_hashes, len(request.all_token_ids)
    )
    return count


@pytest.mark.parametrize("delay", [False, True])
def test_whoever_is_admitted_publishes_what_its_forward_makes_final(delay: bool):
    manager, request = make_manager(), make_request(18)
    # The active block is [16, 20): of three pages, two are final.
    assert manager.allocate_slots(request, 20, delay_cache_blocks=delay)
    assert published(manager, request) == 16


def test_a_part_of_a_prompt_publishes_that_part():
    manager, request = make_manager(), make_request(30)
    assert manager.allocate_slots(request, 12)
    assert published(manager, request) == 8


def test_nothing_that_vllm_calls_publishes():
    """A block that was finished just now has KV that was computed with masks."""
    manager, request = make_manager(), make_request(10, max_tokens=16)
    assert manager.allocate_slots(request, 12)
    compute(request)
    assert published(manager, request) == 8
    write(request, 6)  # [8, 16) is a page, and known; the block [12, 16) is not final
    (pages,) = manager.coordinator.single_type_managers
    request.num_computed_tokens = 12
    assert manager.allocate_slots(request, 8, delay_cache_blocks=False)
    manager.cache_blocks(request, 16)
    manager.coordinator.cache_blocks(request, 16)
    pages.cache_blocks(request, 16, replay_boundaries=[])
    assert published(manager, request) == 8
    manager.free(request)
    assert published(manager, request) == 8


def test_publishing_leaves_the_active_block_out():
    manager, request = make_manager(), make_request(10, max_tokens=16)
    assert manager.allocate_slots(request, 12)
    compute(request)
    write(request, 3)
    assert manager.allocate_slots(request, 8)
    manager.publish(request, 16)
    assert published(manager, request) == 8
    write(request, 3)
    manager.publish(request, 16)
    assert published(manager, request) == 16


def test_pages_of_the_second_stage_are_no_clients():
    """Blocks of one leave other KV; a client may send any text as its salt."""
    request = make_request(16)
    own = [*request.block_hashes]
    request.cache_salt = "client"
    request.enter_second_stage()
    second = [*request.block_hashes]
    others = []
    for salt in (None, "", "client", "client blocks of 1", " blocks of 1"):
        request.cache_salt = salt
        request.block_hashes = []
        request.update_block_hashes()
        others += request.block_hashes
    assert others[:2] == own
    assert not set(second) & set(others)
