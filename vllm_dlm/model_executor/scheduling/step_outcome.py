# SPDX-License-Identifier: Apache-2.0
"""The worker's reply to one step, taken apart before vLLM reads what is left of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm import envs
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from vllm_dlm.config.frames import put_frame
from vllm_dlm.model_executor.reply import take_health
from vllm_dlm.model_executor.scheduling.frames import frame_of, take_frames
from vllm_dlm.model_executor.step_maps import (
    request_rows,
    take_columns,
    up_to_the_end,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_dlm.config.frames import Frame
    from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest


@dataclass
class StepOutcome:
    """What a reply says that vLLM does not know of; `reply.py` lists it."""

    head_rows: int = 0
    """Rows that went through lm_head."""
    broken: frozenset[str] = frozenset()
    """Requests whose logits left no token to choose: they end, in an error."""
    step_maps: dict[str, np.ndarray] = field(default_factory=dict)
    """By request, of those that asked: rows as of `step_maps.request_rows`."""
    drafting: set[str] = field(default_factory=set)
    """Those of them whose forwards may do several steps."""
    frames: dict[str, Frame] = field(default_factory=dict)
    """By request, of those that are watched."""

    def put_step_maps(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Send step maps along with the tokens that vLLM has made outputs of."""
        if not self.step_maps:
            return
        for output in outputs:
            rows = self.step_maps.get(output.request_id)
            if rows is None:
                continue
            count = len(output.new_token_ids)
            if not output.finished:
                rows = rows[:count]
            elif output.request_id in self.drafting:
                rows = up_to_the_end(rows, count)
            output.routed_experts = rows

    def put_frames(
        self,
        outputs: dict[int, EngineCoreOutputs],
        requests: Mapping[str, CanvasRequest],
    ) -> None:
        """Send frames to the front ends of their requests.

        Args:
            outputs: by front end, as vLLM has made them; those of steps that handed
                nothing out are added.
            requests: of the step, by id.
        """
        if not self.frames:
            return
        made = {
            one.request_id: one for each in outputs.values() for one in each.outputs
        }
        for request_id, frame in self.frames.items():
            output = made.get(request_id)
            if output is None:
                output = EngineCoreOutput(request_id, [])
                client = requests[request_id].client_index
                outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
            emitted = list(requests[request_id].output_token_ids[frame.final :])
            put_frame(frame._replace(emitted=emitted), output)


def take_apart(
    reply: ModelRunnerOutput, requests: Mapping[str, CanvasRequest]
) -> StepOutcome:
    """Take off a reply what vLLM does not know, and tell each request of its step.

    Args:
        reply: of the worker; changed in place. What is left of a request's tokens is
            text, to be appended.
        requests: those that are not finished, by id.
    """
    broken, head_rows = take_health(reply, for_vllm=envs.VLLM_COMPUTE_NANS_IN_LOGITS)
    outcome = StepOutcome(head_rows, frozenset(broken) & requests.keys())
    logprobs, columns = take_columns(reply.logprobs)
    reply.logprobs = logprobs
    frames = take_frames(reply)
    for row, tokens in enumerate(reply.sampled_token_ids or ()):
        request = requests.get(reply.req_ids[row])
        if request is None or not tokens:
            continue
        request.take_tokens(tokens)
        request_id = request.request_id
        if request_id in outcome.broken:
            # Nothing of it is handed out; vLLM looks at a request that got tokens.
            tokens[:] = [0]
            continue
        if frames is not None and (frame := frame_of(frames[row], request)):
            outcome.frames[request_id] = frame
        if request.dlm.step_map and logprobs is not None and columns is not None:
            rows = request_rows(columns, logprobs, row, request.steps.before)
            outcome.step_maps[request_id] = rows
            if request.max_branches > 1:
                request.steps.note_rows(rows)
                outcome.drafting.add(request_id)
    return outcome
