# SPDX-License-Identifier: Apache-2.0
"""Rows of a request's forwards, by hand; blocks of 4 positions unless said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request, RequestStatus

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.scheduling.canvas_request import (
    CanvasRequest,
    FinalBlocksKVCacheManager,
)
from vllm_dlm.model_executor.step_maps import StepCount

MAX_CANVAS = 32
PAGE = 8
"""Tokens in a KV page."""

init_none_hash(sha256)


def make_request(
    prompt_len: int,
    max_tokens: int = 8,
    *,
    max_model_len: int = 1024,
    cache: str = "none",
    cache_config: dict[str, int] | None = None,
    commit: str = "fused",
    **model: Any,
) -> CanvasRequest:
    """A waiting request, as the scheduler makes it; class B unless `model` says."""
    declared = {"model_class": "B", "block_length": 4, "block_origin": "start"} | model
    defaults = ModelDefaults(strategy="static", mask_token_id=120, **declared)
    request = Request(
        request_id="one",
        prompt_token_ids=list(range(prompt_len)),
        sampling_params=SamplingParams(max_tokens=max_tokens),
        pooling_params=None,
        block_hasher=get_request_block_hasher(PAGE, sha256),
    )
    request.__class__ = CanvasRequest
    request.model = defaults
    server = DlmConfig(cache=cache, cache_config=cache_config or {}, commit=commit)
    request.dlm = resolve(server, None, defaults)
    request.dlm = request.dlm.sized(max_tokens, MAX_CANVAS)
    request.origin = defaults.origin(prompt_len, request.dlm.block_length)
    request.stop_ids = frozenset({121, 7})
    request.steps = StepCount()
    request.reach = request.dlm.reach(defaults.shift)
    request.frontiers = [request.block_start]
    request.commits_alone = server.commit == "separate"
    request.open_canvas(MAX_CANVAS, max_model_len)
    request.begin()
    return request


def compute(request: CanvasRequest, end: int | None = None) -> tuple[int, int, int]:
    """One forward: its rows' start and end, and how many of them are canvas."""
    request.note_frontier()
    start, request.rows_end = request.next_rows()
    end = request.rows_end if end is None else end
    assert request.whole_rows(start, end) == end - start
    request.status = RequestStatus.RUNNING
    canvas_rows = request.computed(start, end)
    if canvas_rows:
        request.note_step()
    return start, end, canvas_rows


def write(request: CanvasRequest, count: int) -> None:
    request.append_output_token_ids([1] * count)


# -- class B ---------------------------------------------------------------


def test_a_prompt_shares_its_last_block_with_the_text():
    request = make_request(10)
    assert (request.origin, request.block_start, request.canvas_end) == (0, 8, 20)
    assert compute(request) == (0, 12, 2)  # positions 10 and 11
    assert compute(request) == (8, 12, 2)  # nothing was final: once more
    write(request, 1)
    assert compute(request) == (8, 12, 2)
    write(request, 1)
    # The finished block is computed for good, along with the next one.
    assert compute(request) == (8, 16, 4)
    assert compute(request) == (12, 16, 4)
    write(request, 4)
    assert compute(request) == (12, 20, 4)
    assert compute(request) == (16, 20, 4)


def test_a_prompt_of_whole_blocks():
    request = make_request(8)
    assert request.canvas_end == 16
    assert compute(request) == (0, 12, 4)
    assert compute(request) == (8, 12, 4)


def test_a_prompt_shorter_than_a_block():
    request = make_request(1, max_tokens=2)
    assert request.canvas_end == 4
    assert compute(request) == (0, 4, 3)
    assert compute(request) == (0, 4, 3)


def test_the_context_ends_inside_a_block():
    request = make_request(10, max_tokens=8, max_model_len=14)
    assert request.canvas_end == 14
    compute(request)
    write(request, 2)
    assert compute(request) == (8, 14, 2)
    assert compute(request) == (12, 14, 2)


def test_a_prompt_is_cut_at_block_ends():
    request = make_request(22)  # whose active block is [20, 24)
    assert request.rows_end == 24
    assert [request.whole_rows(0, end) for end in (3, 4, 11, 12, 20, 23, 24)] == (
        [0, 4, 8, 12, 20, 20, 24]
    )
    assert compute(request, end=12) == (0, 12, 0)
    assert request.whole_rows(12, 15) == 0
    assert compute(request, end=20) == (12, 20, 0)
    assert compute(request) == (20, 24, 2)
    assert compute(request) == (20, 24, 2)


def test_a_cached_prompt_is_not_computed():
    request = make_request(22)
    assert request.computed(16, 24) == 2
    assert request.kv_final == 20
    assert request.next_rows() == (20, 24)


def test_rows_of_later_blocks_are_not_cut():
    """The finished block and the one that needs it, or neither."""
    request = make_request(10)
    compute(request)
    write(request, 2)
    start, request.rows_end = request.next_rows()
    assert (start, request.rows_end) == (8, 16)
    assert [request.whole_rows(8, end) for end in (11, 12, 15, 16)] == [0, 0, 0, 8]


def test_who_was_preempted_computes_all_its_text_again_in_chunks():
    request = make_request(10, max_tokens=16)
    for count in (2, 4, 3):
        compute(request)
        write(request, count)
    assert request.next_rows() == (16, 20)
    request.status = RequestStatus.PREEMPTED
    request.begin()
    # The active block is [16, 20): three of its tokens were handed out.
    assert request.num_tokens == request.rows_end == 20
    assert compute(request, end=8) == (0, 8, 0)
    assert compute(request, end=16) == (8, 16, 0)
    assert compute(request) == (16, 20, 4)


def sub_blocks(prompt_len: int, **options: Any) -> CanvasRequest:
    return make_request(
        prompt_len,
        max_tokens=20,
        block_length=8,
        sub_block_length=4,
        cache="dual",
        **options,
    )


def test_sub_blocks_are_computed_alone_once_begun():
    request = sub_blocks(9)
    rows = decode(request, [0, 1, 1, 1, 0, 1, 1, 1, 1])
    # The prompt's last token is the first one of its sub-block.
    assert rows[:3] == [(0, 16), (8, 12), (8, 12)]
    # The second one's first token is written by steps of the block.
    assert rows[3:] == [(8, 12), (8, 16), (8, 16), (12, 16), (12, 16), (12, 16)]
    # The finished block is computed as a whole, and with it the next one's first step.
    assert decode(request, [1, 1]) == [(8, 24), (16, 20)]


def test_a_seed_is_no_step_of_its_block():
    request = sub_blocks(8, shift=1)
    assert decode(request, [1, 1, 1]) == [(0, 8), (8, 16), (8, 12)]


def test_a_replay_of_sub_blocks_computes_the_same_rows():
    """Tokens that were handed out say nothing of where the text stood."""
    for model in ({}, {"shift": 1}):
        request = sub_blocks(8, **model)
        rows = decode(request, [1, 0, 2, 1, 1, 1])
        request.status = RequestStatus.PREEMPTED
        request.begin()
        # A seed is not repeated.
        first = 1 if model else 0
        again = [compute(request)[:2] for _ in range(6 - first)]
        assert again == [(0, 16), *rows[first + 1 :]]


def test_waiting_counts_rows_and_running_counts_tokens():
    request = make_request(10)
    assert request.num_tokens == request.num_tokens_with_spec == 12
    compute(request)
    assert request.num_tokens == 10
    assert request.num_tokens_with_spec == 12


def test_blocks_counted_from_the_prompts_end():
    request = make_request(10, block_origin="prompt")
    assert (request.origin, request.block_start, request.canvas_end) == (2, 10, 18)
    # The very first block is the shorter one, [0, 2).
    assert [request.whole_rows(0, end) for end in (1, 2, 9, 10, 13, 14)] == (
        [0, 2, 6, 10, 10, 14]
    )
    assert compute(request) == (0, 14, 4)
    write(request, 4)
    assert compute(request) == (10, 18, 4)


def test_a_finished_block_may_be_committed_alone():
    request = make_request(10, max_tokens=16, commit="separate")
    assert compute(request) == (0, 12, 2)  # of the prompt's blocks none is awaited
    write(request, 2)
    assert compute(request) == (8, 12, 0)
    assert compute(request) == (12, 16, 4)
    write(request, 3)
    assert compute(request) == (12, 16, 4)
    write(request, 1)
    assert compute(request) == (12, 16, 0)
    request.status = RequestStatus.PREEMPTED
    request.begin()
    # Who comes back computes its text along with the block that it is at.
    assert compute(request) == (0, 20, 4)


# -- class B with a shift: a block's first token comes from the block before --


def test_a_seed_is_predicted_by_finished_rows_alone():
    request = make_request(8, shift=1)
    assert compute(request) == (0, 8, 1)
    write(request, 1)
    assert compute(request) == (8, 12, 4)
    write(request, 3)
    assert compute(request) == (8, 12, 1)
    write(request, 1)
    assert compute(request) == (12, 16, 4)


def test_a_block_begun_by_the_prompt_needs_no_seed():
    request = make_request(9, shift=1)
    assert compute(request) == (0, 12, 3)
    write(request, 3)
    assert compute(request) == (8, 12, 1)


def test_chunks_before_a_seed_decide_nothing():
    request = make_request(12, shift=1)
    assert request.whole_rows(0, 11) == 8
    assert compute(request, end=8) == (0, 8, 0)
    assert compute(request) == (8, 12, 1)


def test_who_was_preempted_behind_a_seed_keeps_it():
    """The seed is not predicted again: the worker knows it by its handed out token."""
    request = make_request(8, shift=1)
    for _ in range(2):
        compute(request)
        write(request, 1)
    request.status = RequestStatus.PREEMPTED
    request.begin()
    assert compute(request) == (0, 12, 4)


# -- class A: everything sees everything ------------------------------------


def test_full_attention_computes_everything_at_once():
    request = make_request(
        10, max_tokens=9, model_class="A", block_origin="prompt", cache="dual"
    )
    # Blocks are counted from the prompt's end; the canvas is whole blocks.
    assert (request.origin, request.block_start, request.canvas_end) == (2, 10, 22)
    assert request.whole_rows(0, 21) == 0
    assert compute(request) == (0, 22, 12)
    assert compute(request) == (10, 14, 4)
    assert request.kv_final == 0
    write(request, 4)
    assert compute(request) == (0, 22, 12)
    assert compute(request) == (14, 18, 4)


def test_full_attention_with_a_shift_reads_the_row_to_the_left():
    request = make_request(
        10, model_class="A", block_origin="prompt", cache="dual", shift=1
    )
    assert compute(request) == (0, 18, 8)
    assert compute(request) == (9, 14, 4)


def test_full_attention_continues_on_a_further_canvas():
    request = make_request(3, max_tokens=50, model_class="A", block_origin="prompt")
    assert request.canvas_end == 3 + MAX_CANVAS
    write(request, 32)
    request.open_canvas(MAX_CANVAS, 1024)
    assert request.canvas_end == 35 + 20  # 18 are left


def test_vicinity_warms_up_once():
    request = make_request(
        10,
        model_class="A",
        block_origin="prompt",
        cache="vicinity",
        cache_config={"look_back": 3, "look_ahead": 2, "warmup_steps": 1},
    )
    assert [compute(request)[:2] for _ in range(3)] == [(0, 18), (0, 18), (7, 16)]
    write(request, 4)
    assert [compute(request)[:2] for _ in range(2)] == [(0, 18), (11, 18)]


def window_request() -> CanvasRequest:
    return make_request(
        10,
        max_tokens=12,
        model_class="A",
        block_origin="prompt",
        block_length=12,
        cache="window",
        cache_config={"active_window": 3, "external_window": 5, "refresh_every": 4},
    )


def decode(request: CanvasRequest, counts: list[int]) -> list[tuple[int, int]]:
    """Rows of the forwards that write so many tokens each, from the left."""
    found = []
    for count in counts:
        found.append(compute(request)[:2])
        write(request, count)
    return found


def test_a_window_moves_with_the_text():
    rows = decode(window_request(), [1, 2, 0, 0, 3, 1])
    assert rows == [(0, 22), (10, 14), (11, 16), (13, 16), (0, 22), (13, 19)]


def test_a_replay_moves_its_window_as_before():
    """Tokens that were handed out say nothing of where the window stood."""
    request = window_request()
    rows = decode(request, [1, 2, 0, 0, 3])
    request.status = RequestStatus.PREEMPTED
    request.begin()
    assert [compute(request)[:2] for _ in range(5)] == rows
    assert decode(request, [1, 1]) == [(13, 19), (16, 20)]


# -- class C: a causal context, one block whole ------------------------------


def test_causal_context_keeps_finished_blocks_too():
    request = make_request(10, model_class="C", block_origin="prompt")
    assert (request.block_start, request.canvas_end) == (10, 18)
    assert compute(request) == (0, 14, 4)
    assert compute(request) == (10, 14, 4)
    write(request, 4)
    assert compute(request) == (10, 18, 4)


# -- pages that others may find ----------------------------------------------


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
    request.enter_second_stage(MAX_CANVAS, 1024)
    second = [*request.block_hashes]
    others = []
    for salt in (None, "", "client", "client blocks of 1", " blocks of 1"):
        request.cache_salt = salt
        request.block_hashes = []
        request.update_block_hashes()
        others += request.block_hashes
    assert others[:2] == own
    assert not set(second) & set(others)


# -- how many rows a forward may have ---------------------------------------


@pytest.mark.parametrize("commit", ["fused", "separate"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("origin", ["start", "prompt"])
def test_two_blocks_of_rows_are_enough(origin: str, shift: int, commit: str):
    """What the server is refused with less of, at start: nobody waits for ever."""
    for prompt_len in range(1, 30):
        request = make_request(
            prompt_len, 21, block_origin=origin, shift=shift, commit=commit
        )
        written = 0
        while written < 21:
            start, end = request.next_rows()
            request.rows_end = end
            rows = request.whole_rows(start, min(end, start + 8))
            assert rows > 0
            _, end, canvas_rows = compute(request, start + rows)
            if canvas_rows:
                block_end = request.block_start + 4
                seed = end == request.block_start
                count = 1 if seed else min(block_end, end) - len(request.all_token_ids)
                write(request, count)
                written += count


# -- the text's end -----------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "belong"),
    [([1, 2, 3], 3), ([1, 121, 3], 2), ([7, 121], 1), ([1, 2, 121], 3), ([], 0)],
)
def test_tokens_behind_a_stop_id_are_padding(tokens: list[int], belong: int):
    assert make_request(4).num_tokens_to_stop(tokens) == belong
