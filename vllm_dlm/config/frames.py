# SPDX-License-Identifier: Apache-2.0
"""A frame of a watched request, on its way from the scheduler to the front end.

The scheduler makes it (`model_executor/frames.py`), and it goes along with the
request's outputs. `entrypoints/frames.py` shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

MASK = -1
"""In a token's place."""
NOT_READ = -1.0
"""The confidence of a position whose logits the step has not read."""

KEY = "dlm_frame"
"""Of `kv_transfer_params`, where a frame travels."""


class Frame(NamedTuple):
    """The active block of one request after a step.

    Positions count the request's output tokens.
    """

    watched: int
    """The number of whoever watches (`carried.WATCHED`)."""
    block: int
    """Number of the block, from 0."""
    step: int
    """Number of the step in its block, from 0."""
    total: int
    """Most steps that the block is planned to take."""
    forward: int
    """Number of the step in the request, as in a step map."""
    final: int
    """Tokens that were handed out before this step."""
    start: int
    """Position of `tokens[0]`."""
    end: int
    """Where the canvas ends: positions from here on do not exist."""
    tokens: list[int]
    """`MASK` for a mask."""
    confidence: list[float]
    """Of each position in this step; `NOT_READ` where it was not read."""
    emitted: list[int]
    """Tokens that the step has handed out, from position `final` on; not all lie in the
    block, where the request has brought some of its canvas itself."""


def put_frame(frame: Frame, output: EngineCoreOutput) -> None:
    """Send a frame along with an output."""
    params = output.kv_transfer_params or {}
    output.kv_transfer_params = {**params, KEY: list(frame)}


def take_frame(output: EngineCoreOutput) -> Frame | None:
    """Take the frame off an output, in place; None if it has none."""
    params = output.kv_transfer_params
    if params is None or KEY not in params:
        return None
    others = {key: value for key, value in params.items() if key != KEY}
    output.kv_transfer_params = others or None
    return Frame(*params[KEY])
