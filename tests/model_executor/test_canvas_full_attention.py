# SPDX-License-Identifier: Apache-2.0
"""Rows of a request's forwards, by hand; full attention, blocks of 4 unless said."""

from __future__ import annotations

from canvas_requests import (
    MAX_CANVAS,
    compute,
    decode,
    make_request,
    places,
    preempt,
    write,
)

from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest


def test_full_attention_computes_everything_at_once():
    request = make_request(
        10, max_tokens=9, attention="full", block_origin="prompt", cache="dual"
    )
    # Blocks are counted from the prompt's end; the canvas is whole blocks.
    assert places(request) == (2, 10, 22)
    assert request.whole_rows(0, 21) == 0
    assert compute(request) == (0, 22, 12)
    assert compute(request) == (10, 14, 4)
    assert request.kv_final == 0
    write(request, 4)
    assert compute(request) == (0, 22, 12)
    assert compute(request) == (14, 18, 4)


def test_full_attention_with_a_shift_reads_the_row_to_the_left():
    request = make_request(
        10, attention="full", block_origin="prompt", cache="dual", shift=1
    )
    assert compute(request) == (0, 18, 8)
    assert compute(request) == (9, 14, 4)


def test_full_attention_continues_on_a_further_canvas():
    request = make_request(3, max_tokens=50, attention="full", block_origin="prompt")
    assert request.canvas_end == 3 + MAX_CANVAS
    write(request, 32)
    request.open_canvas()
    assert request.canvas_end == 35 + 20  # 18 are left


def test_vicinity_warms_up_once():
    request = make_request(
        10,
        attention="full",
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
        attention="full",
        block_origin="prompt",
        block_length=12,
        cache="window",
        cache_config={"active_window": 3, "external_window": 5, "refresh_every": 4},
    )


def decode_window(request: CanvasRequest, counts: list[int]) -> list[tuple[int, int]]:
    """As `decode`, and the worker says with which mask the next rows end."""
    found = []
    for count in counts:
        found += decode(request, [count])
        is_refresh = request.step % 4 == 0
        request.said_end = request.num_tokens + (5 if is_refresh else 3)
    return found


def test_a_window_moves_with_the_text():
    rows = decode_window(window_request(), [1, 2, 0, 0, 3, 1])
    assert rows == [(0, 15), (10, 14), (10, 16), (10, 16), (0, 18), (13, 19)]


def test_a_replay_moves_its_window_as_before():
    """Tokens that were handed out say nothing of where the window stood."""
    request = window_request()
    rows = decode_window(request, [1, 2, 0, 0, 3])
    preempt(request)
    assert [compute(request)[:2] for _ in range(5)] == rows
    assert decode_window(request, [1, 1]) == [(13, 19), (13, 20)]
