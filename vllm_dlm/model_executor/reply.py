# SPDX-License-Identifier: Apache-2.0
"""What a step has to say beside tokens, and in which of vLLM's fields it travels.

vLLM's reply has fixed fields, made for autoregressive models. From worker to scheduler:

- where the canvas ends now: a negative number behind a request's tokens; and behind
  that another, where the rows of the request's next forward end;
- rows through lm_head, and which requests' logits are broken: `num_nans_in_logits`, of
  which vLLM reads nothing by default;
- step maps: columns of the log-probabilities (`step_maps.py`);
- frames, of canvases that somebody watches: in place of the tokens that sampling has
  left (`sampling_masks`), which are not returned for our models (`frames.py`).

From the scheduler on (`scheduler.py`): step maps as `routed_experts` of each output,
frames as an entry of `kv_transfer_params`, with outputs that have no token too,
rows of a forward as `scheduled_spec_decode_tokens`, the work of a step as
`num_draft_tokens_per_pos` of the statistics for `/metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsTensors, ModelRunnerOutput
    from vllm.v1.worker.gpu.sample.output import SamplingMaskTensors

    from vllm_dlm.model_executor.frames import FrameTensors


def put_end(
    tokens: torch.Tensor,
    count: torch.Tensor,
    end: torch.Tensor,
    says_end: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a position behind what each request's row has to say.

    Args:
        tokens: [R, W] int64, of which the first `count` [R] are meant; W > count.
        end: [R] int64, the position.
        says_end: [R] bool, for which requests.

    Returns:
        [R, W] int64, and [R] int64: how many of each row are meant.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    at_end = (place == count[:, None]) & says_end[:, None]
    tokens = torch.where(at_end, -(end[:, None] + 1), tokens)
    return tokens, count + says_end.long()


def take_ends(tokens: list[int]) -> tuple[int | None, int | None]:
    """Take the canvas's end and the rows' end off a request's tokens, in place.

    Each is None if it is not there.
    """
    ends: list[int | None] = [None, None]
    while tokens and tokens[-1] < 0:
        ends.insert(0, -tokens.pop() - 1)
    return ends[0], ends[1]


BROKEN = 1 << 30
"""Added to a request's number: its logits left no token to choose."""


def health(broken: torch.Tensor, head_rows: torch.Tensor) -> torch.Tensor:
    """[R] int64: whether a request's logits are broken, and its rows through lm_head.

    Args:
        broken: [R] bool.
        head_rows: [R] int64: of all requests, any split: vLLM wants numbers by request,
            and the scheduler reads a sum.
    """
    return broken * BROKEN + head_rows


class Reply(NamedTuple):
    """A step's reply, a row for each request of vLLM's batch.

    And one row more, of what stands for no request (`block_rows.pack`).
    """

    tokens: torch.Tensor
    """[requests + 1, W + 1] int64; W is B, or more."""
    counts: torch.Tensor
    """[6, requests + 1] int32: tokens of each row that are meant; rows of the forward
    that were computed in vain, as vLLM counts; `health`; and, for the next plan, where
    the active block begins, where the canvas ends, and the steps of the block so far.
    """
    masked: torch.Tensor
    """[requests + 1, B] bool, for the next plan: masks of the active block."""

    @property
    def canvas_ends(self) -> torch.Tensor:
        """[requests + 1] int32: where each canvas ends after the step."""
        return self.counts[4]

    @classmethod
    def empty(
        cls, num_reqs: int, width: int, device: torch.device, most: int = 0
    ) -> Reply:
        """The reply of requests that decide nothing: a part of a prompt.

        Args:
            width: B: positions of the longest block that is decided.
            most: tokens that a request is handed at most, where it is more: what it has
                written itself comes along with a block.
        """
        columns = max(width, most) + 1
        tokens = torch.zeros(num_reqs + 1, columns, dtype=torch.int64, device=device)
        return cls(
            tokens,
            tokens.new_zeros(6, num_reqs + 1, dtype=torch.int32),
            tokens.new_zeros(num_reqs + 1, width, dtype=torch.bool),
        )

    def write(
        self,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        counts: tuple[torch.Tensor, ...],
        masked: torch.Tensor,
    ) -> None:
        """Write the rows [R] of a group.

        Args:
            tokens: [R, B + 1] int64; of requests with a canvas [R, W + 1].
            counts: [R] each, in the order of `counts`.
            masked: [R, B] bool.
        """
        columns = torch.arange(tokens.shape[1], device=rows.device)
        self.tokens[rows[:, None], columns] = tokens
        self.counts[:, rows] = torch.stack(counts).int()
        self.masked[rows[:, None], columns[: masked.shape[1]]] = masked

    def for_runner(
        self,
        logprobs: LogprobsTensors | None,
        for_vllm: bool,
        frames: FrameTensors | None = None,
    ) -> SamplerOutput:
        """In vLLM's form.

        Args:
            for_vllm: vLLM looks for NaNs (`VLLM_COMPUTE_NANS_IN_LOGITS`): the numbers
                are its own, above 0 where there are some.
            frames: of the requests that are watched, if any is.
        """
        num_sampled, num_rejected, num_nans = self.counts[:3, :-1]
        if for_vllm:
            num_nans = (num_nans >= BROKEN).int()
        return SamplerOutput(
            sampled_token_ids=self.tokens[:-1],
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            # It is read by the methods that frames have too.
            sampling_mask_tensors=cast("SamplingMaskTensors | None", frames),
        )


def take_health(reply: ModelRunnerOutput, for_vllm: bool) -> tuple[list[str], int]:
    """Take off the reply, in place, what `health` says.

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
