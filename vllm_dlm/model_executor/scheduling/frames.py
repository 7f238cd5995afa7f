# SPDX-License-Identifier: Apache-2.0
"""Frames, as the scheduler takes them off a reply.

It counts positions and steps as a client does. The frame goes to the request's front
end (`entrypoints/frames.py`), also where no token became final.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_dlm.config.frames import Frame
from vllm_dlm.model_executor.frames import COLUMNS, NOWHERE, START

if TYPE_CHECKING:
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest


def take_frames(reply: ModelRunnerOutput) -> np.ndarray | None:
    """Take the frames off a worker's reply, in place: as of `FrameTensors.tolists`.

    (vLLM's own masks never stand there: our models return none.)
    """
    rows: Any = reply.sampling_masks
    reply.sampling_masks = None
    return rows


def frame_of(row: np.ndarray, request: CanvasRequest) -> Frame | None:
    """The frame in a request's row; None if there is none, or nobody watches.

    Args:
        row: [COLUMNS + 2 W] int32.
        request: its step is counted already, its tokens are not appended yet: when
            they are, `emitted` can be filled in.
    """
    if request.watched is None or row[START] < 0:
        return None
    start, end, step = row[:COLUMNS].tolist()
    tokens, bits = np.split(row[COLUMNS:], 2)
    prompt_len = request.num_prompt_tokens
    # A prompt may end inside a block.
    own = slice(max(prompt_len - start, 0), int((tokens != NOWHERE).sum()))
    first = request.layout.block_at(prompt_len)
    steps = request.steps
    before = steps.before
    if steps.block != request.block_start:
        before += steps.in_block + steps.joined
    return Frame(
        watched=request.watched,
        block=(start - first) // request.layout.block_length,
        step=step,
        total=request.layout.steps_per_block,
        forward=before + step,
        final=request.num_output_tokens,
        start=start + own.start - prompt_len,
        end=end - prompt_len,
        tokens=tokens[own].tolist(),
        confidence=bits[own].view(np.float32).round(4).tolist(),
        emitted=[],
    )
