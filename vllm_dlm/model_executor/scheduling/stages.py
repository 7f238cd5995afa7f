# SPDX-License-Identifier: Apache-2.0
"""From the first stage of the option `tccf` to the second (`config/tccf.py`)."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from vllm_dlm.config.tccf import SECOND_STAGE

if TYPE_CHECKING:
    from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest

_ENDS = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def is_thought_out(request: CanvasRequest, max_model_len: int) -> bool:
    """Whether the first stage has ended with the tokens that were just appended.

    The request has stopped then, unless it did so with the trigger, or with a cut.
    """
    stages = request.stages
    if stages is None or request.num_tokens >= max_model_len:
        return False
    if request.num_output_tokens >= request.most_tokens:
        return False
    has_stopped = request.is_finished()
    if not has_stopped and stages.end_with(request.output_token_ids):
        return True
    ends = request.status in _ENDS if has_stopped else request.was_cut()
    return stages.always and ends


def drop_its_end(request: CanvasRequest, new_tokens: list[int]) -> list[int]:
    """Drop what ended the first stage, and let the request go on.

    Tokens of the trigger that were sent in earlier steps stay with the client, and
    count for the request, but the second stage does not see them.

    Args:
        request: a request whose first stage has ended; without its check text.
        new_tokens: what was appended in this step.

    Returns:
        What is left of `new_tokens`.
    """
    stages = request.stages
    assert stages is not None
    output = request.output_token_ids
    dropped = 0
    if stages.end_with(output):
        dropped = 0 if stages.keep_trigger else len(stages.trigger)
    elif output and output[-1] in request.stop_ids:
        dropped = 1
    if dropped:
        del request._output_token_ids[-dropped:]
        del request._all_token_ids[-dropped:]
    if request.is_finished():
        request.status, request.stop_reason = RequestStatus.RUNNING, None
    sent_before = max(dropped - len(new_tokens), 0)
    whole = request.most_tokens
    most = stages.most_tokens(request.num_output_tokens, whole)
    most = min(most, whole - sent_before)
    params = copy(request.sampling_params)
    params.extra_args = {**(params.extra_args or {}), SECOND_STAGE: True}
    request.set_max_tokens(most, params)
    return new_tokens[: max(len(new_tokens) - dropped, 0)]
