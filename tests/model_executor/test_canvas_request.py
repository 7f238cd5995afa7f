# SPDX-License-Identifier: Apache-2.0
"""Rows of a request's forwards, by hand; block attention, blocks of 4 unless said."""

from __future__ import annotations

from typing import Any

import pytest
from canvas_requests import compute, decode, make_request, places, preempt, write

from vllm_dlm.model_executor.layout import Rows
from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest

# -- block attention ---------------------------------------------------------------


def test_a_prompt_shares_its_last_block_with_the_text():
    request = make_request(10)
    assert places(request) == (0, 8, 20)
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
    assert request.canvas_rows(Rows(16, 24)) == 2
    request.note_computed(Rows(16, 24))
    assert request.kv_final == 20
    assert request.next_rows() == (20, 24)


def test_rows_of_later_blocks_are_not_cut():
    """The finished block and the one that needs it, or neither."""
    request = make_request(10)
    compute(request)
    write(request, 2)
    request.plan_step()
    assert (request.num_computed_tokens, request.rows_end) == (8, 16)
    assert [request.whole_rows(8, end) for end in (11, 12, 15, 16)] == [0, 0, 0, 8]


def test_who_was_preempted_computes_all_its_text_again_in_chunks():
    request = make_request(10, max_tokens=16)
    for count in (2, 4, 3):
        compute(request)
        write(request, count)
    assert request.next_rows() == (16, 20)
    preempt(request)
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


def test_a_lead_is_no_step_of_its_block():
    request = sub_blocks(8, shift=1)
    assert decode(request, [1, 1, 1]) == [(0, 8), (8, 16), (8, 12)]


def test_a_replay_of_sub_blocks_computes_the_same_rows():
    """Tokens that were handed out say nothing of where the text stood."""
    for model in ({}, {"shift": 1}):
        request = sub_blocks(8, **model)
        rows = decode(request, [1, 0, 2, 1, 1, 1])
        preempt(request)
        # A lead is not repeated.
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
    assert places(request) == (2, 10, 18)
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
    preempt(request)
    # Who comes back computes its text along with the block that it is at.
    assert compute(request) == (0, 20, 4)


# -- with a shift: a block's lead comes from the block before -----------------


def test_a_lead_is_predicted_by_finished_rows_alone():
    request = make_request(8, shift=1)
    assert compute(request) == (0, 8, 1)
    write(request, 1)
    assert compute(request) == (8, 12, 4)
    write(request, 3)
    assert compute(request) == (8, 12, 1)
    write(request, 1)
    assert compute(request) == (12, 16, 4)


def test_a_block_begun_by_the_prompt_needs_no_lead():
    request = make_request(9, shift=1)
    assert compute(request) == (0, 12, 3)
    write(request, 3)
    assert compute(request) == (8, 12, 1)


def test_chunks_before_a_lead_decide_nothing():
    request = make_request(12, shift=1)
    assert request.whole_rows(0, 11) == 8
    assert compute(request, end=8) == (0, 8, 0)
    assert compute(request) == (8, 12, 1)


def test_who_was_preempted_behind_a_lead_keeps_it():
    """The lead is not predicted again: the worker knows it by its handed out token."""
    request = make_request(8, shift=1)
    for _ in range(2):
        compute(request)
        write(request, 1)
    preempt(request)
    assert compute(request) == (0, 12, 4)


# -- causal attention but for one block ---------------------------------------


def test_causal_context_keeps_finished_blocks_too():
    request = make_request(10, attention="causal", block_origin="prompt")
    assert (request.block_start, request.canvas_end) == (10, 18)
    assert compute(request) == (0, 14, 4)
    assert compute(request) == (10, 14, 4)
    write(request, 4)
    assert compute(request) == (10, 18, 4)


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
            request.plan_step()
            start, end = request.num_computed_tokens, request.rows_end
            rows = request.whole_rows(start, min(end, start + 8))
            assert rows > 0
            _, end, canvas_rows = compute(request, start + rows)
            if canvas_rows:
                is_lead = end == request.block_start
                end = min(request.block_start + 4, end)
                count = 1 if is_lead else end - len(request.all_token_ids)
                write(request, count)
                written += count


# -- the text's end -----------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "belong"),
    [([1, 2, 3], 3), ([1, 121, 3], 2), ([7, 121], 1), ([1, 2, 121], 3), ([], 0)],
)
def test_tokens_behind_a_stop_id_are_padding(tokens: list[int], belong: int):
    assert make_request(4).num_tokens_to_stop(tokens) == belong
