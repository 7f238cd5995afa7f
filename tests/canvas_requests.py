# SPDX-License-Identifier: Apache-2.0
"""Requests as the scheduler has them, and their forwards, without a scheduler."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.config.tccf import Stages
from vllm_dlm.model_executor.layout import Limits, Rows
from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest

MAX_CANVAS = 32
PAGE = 8
"""Tokens in a KV page."""

init_none_hash(sha256)


def declared(**model: Any) -> ModelDefaults:
    """What a model declares: block attention and blocks of 4, unless `model` says."""
    block_attention = {"attention": "block", "block_length": 4, "block_origin": "start"}
    return ModelDefaults(
        strategy="static",
        mask_token_id=120,
        stop_ids=(121,),
        **(block_attention | model),
    )


def make_request(
    prompt_len: int,
    max_tokens: int = 8,
    *,
    max_model_len: int = 1024,
    cache: str = "none",
    cache_config: dict[str, int] | None = None,
    commit: str = "fused",
    stages: Stages | None = None,
    **model: Any,
) -> CanvasRequest:
    """A waiting request, of a model that is `declared(**model)`."""
    defaults = declared(**model)
    server = DlmConfig(cache=cache, cache_config=cache_config or {}, commit=commit)
    return CanvasRequest.adopt(
        Request(
            request_id="one",
            prompt_token_ids=list(range(prompt_len)),
            sampling_params=SamplingParams(max_tokens=max_tokens, stop_token_ids=[7]),
            pooling_params=None,
            block_hasher=get_request_block_hasher(PAGE, sha256),
        ),
        resolve(server, None, defaults).sized(max_tokens, MAX_CANVAS),
        defaults,
        Limits(MAX_CANVAS, max_model_len),
        stages=stages,
        commits_alone=server.commit == "separate",
        max_branches=1,
        needs_branches=False,
    )


def places(request: CanvasRequest) -> tuple[int, int, int]:
    """Where its blocks are counted from, its active block, and its canvas's end."""
    return request.layout.origin, request.block_start, request.canvas_end


def compute(request: CanvasRequest, end: int | None = None) -> tuple[int, int, int]:
    """One forward: its rows' start and end, and how many of them are canvas."""
    request.note_frontier()
    request.plan_step()
    start = request.num_computed_tokens
    end = request.rows_end if end is None else end
    assert request.whole_rows(start, end) == end - start
    request.status = RequestStatus.RUNNING
    canvas_rows = request.canvas_rows(Rows(start, end))
    request.note_computed(Rows(start, end))
    if canvas_rows:
        request.note_step()
    return start, end, canvas_rows


def write(request: CanvasRequest, count: int) -> None:
    """Append what a step has made final."""
    request.append_output_token_ids([1] * count)


def decode(request: CanvasRequest, counts: list[int]) -> list[tuple[int, int]]:
    """Rows of the forwards that write so many tokens each, from the left."""
    found = []
    for count in counts:
        found.append(compute(request)[:2])
        write(request, count)
    return found


def preempt(request: CanvasRequest) -> None:
    """Take a running request's pages away, as the scheduler does."""
    request.status = RequestStatus.PREEMPTED
    request.start_over()
