# SPDX-License-Identifier: Apache-2.0
"""What a step has to say beside tokens, and in which of vLLM's fields it travels.

vLLM's reply has fixed fields, made for autoregressive models. From worker to scheduler:

- where the canvas ends now: a negative number behind a request's tokens;
- rows through lm_head, and which requests' logits are broken: `num_nans_in_logits`, of
  which vLLM reads nothing by default;
- step maps: columns of the log-probabilities (`step_maps.py`).

From the scheduler on (`scheduler.py`): step maps as `routed_experts` of each output,
rows of a forward as `scheduled_spec_decode_tokens`, the work of a step as
`num_draft_tokens_per_pos` of the statistics for `/metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.sample.output import SamplerOutput


def put_canvas_end(
    tokens: torch.Tensor,
    count: torch.Tensor,
    canvas_end: torch.Tensor,
    says_end: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the end of each canvas behind the tokens that became final.

    Args:
        tokens: [R, W] int64, of which the first `count` [R] are final; W > count.
        canvas_end: [R] int64, a position.
        says_end: [R] bool, for which requests.

    Returns:
        [R, W] int64, and [R] int32: how many of each row are meant.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    at_end = (place == count[:, None]) & says_end[:, None]
    tokens = torch.where(at_end, -(canvas_end[:, None] + 1), tokens)
    return tokens, (count + says_end.long()).to(torch.int32)


def take_canvas_end(tokens: list[int]) -> int | None:
    """Take the canvas end off a request's tokens, in place; None if it is not there."""
    return -tokens.pop() - 1 if tokens and tokens[-1] < 0 else None


BROKEN = 1 << 30
"""Added to a request's number: its logits left no token to choose."""


def put_health(
    output: SamplerOutput, broken: torch.Tensor, head_rows: int | None
) -> None:
    """Say which requests' logits are broken, and how many rows went through lm_head.

    vLLM wants numbers by request: of the rows, a sum.

    Args:
        broken: [R] bool.
        head_rows: None where vLLM looks for NaNs (`VLLM_COMPUTE_NANS_IN_LOGITS`): then
            the numbers are its own, above 0 where there are some.
    """
    if head_rows is None:
        output.num_nans = broken.int()
        return
    output.num_nans = broken.int() * BROKEN
    output.num_nans[0] += head_rows


def take_health(reply: ModelRunnerOutput, for_vllm: bool) -> tuple[list[str], int]:
    """Take off the reply, in place, what `put_health` has said.

    Args:
        for_vllm: vLLM looks for NaNs: the numbers stay.

    Returns:
        The requests whose logits are broken, and the rows through lm_head.
    """
    by_request = reply.num_nans_in_logits or {}
    if for_vllm:
        return [name for name, number in by_request.items() if number], 0
    reply.num_nans_in_logits = None
    broken = [name for name, number in by_request.items() if number >= BROKEN]
    return broken, sum(by_request.values()) - BROKEN * len(broken)
