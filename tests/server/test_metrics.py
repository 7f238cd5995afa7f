# SPDX-License-Identifier: Apache-2.0
"""Counters on /metrics are exact: what one request costs, to the row."""

from __future__ import annotations

from server.launch import Server

NAMES = (
    "diffusion_num_denoising_steps_total",
    "dlm:rows_total",
    "dlm:lm_head_rows_total",
)


def test_work_of_a_request(server: Server):
    """32 steps of one token: rows are prompt and canvas, lm_head's the masks left."""
    server.wait_until_idle()
    before = server.metrics(*NAMES)
    reply = server.complete(
        "Copy [Ada, Ben]",
        max_tokens=32,
        ignore_eos=True,
        vllm_xargs={"dlm_strategy": "static", "dlm_block_length": 32, "dlm_steps": 32},
    )
    server.wait_until_idle()
    after = server.metrics(*NAMES)
    steps, rows, head_rows = (b - a for a, b in zip(before, after, strict=True))
    assert steps == 32
    assert rows == 32 * (reply.usage.prompt_tokens + 32)
    assert head_rows == sum(range(1, 33))
