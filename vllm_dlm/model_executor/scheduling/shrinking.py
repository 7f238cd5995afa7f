# SPDX-License-Identifier: Apache-2.0
"""Holes that shrink: what a hole holds behind its end is left out of the answer.

The engine fills all holes to their last position, for what is written behind them must
stay where it is. A hole ends with the first token in it that ends a text or pads one.
That token and what follows it in the hole are taken off a request's outputs here, after
vLLM has appended them to the request. Where each token that is left lies in the canvas
goes along as the last column of `EngineCoreOutput.routed_experts`, behind those of a
step map (`step_maps.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.engine import EngineCoreOutput

    from vllm_dlm.config.canvas import Canvas
    from vllm_dlm.model_executor.scheduling.canvas_request import CanvasRequest


def kept_offsets(
    canvas: Canvas, closing_ids: frozenset[int], output: Sequence[int], begin: int
) -> list[int]:
    """The offsets of an output's tokens from `begin` on that are no part of an end.

    A hole with nothing written to its right keeps its end, as an ordinary text does.

    Args:
        canvas: whose holes shrink.
        closing_ids: what ends a hole.
        output: all tokens so far.
    """
    kept = set(range(begin, len(output)))
    for start, length in canvas.holes:
        end = min(start + length, len(output))
        if end <= begin:
            continue
        ends = (at for at in range(start, end) if output[at] in closing_ids)
        first = next(ends, end)
        if start >= canvas.pins_end:
            first += 1
        kept -= set(range(first, end))
    return sorted(kept)


def leave_out(
    outputs: list[EngineCoreOutput],
    requests: Mapping[str, CanvasRequest],
    begins: Mapping[str, int],
) -> None:
    """Take what is behind the ends of holes off outputs, in place.

    Args:
        outputs: of one client; those that are left without a token go, unless they say
            that their request has finished.
        requests: those whose holes shrink.
        begins: how many output tokens they had before this step.
    """
    for output in [one for one in outputs if one.request_id in requests]:
        request, begin = requests[output.request_id], begins[output.request_id]
        canvas = request.layout.canvas
        assert canvas is not None
        count = len(output.new_token_ids)
        tokens = list(request.output_token_ids)[: begin + count]
        offsets = kept_offsets(canvas, request.closing_ids, tokens, begin)
        places = [offset - begin for offset in offsets]
        output.new_token_ids = [output.new_token_ids[place] for place in places]
        logprobs = output.new_logprobs
        if logprobs is not None:
            output.new_logprobs = logprobs._replace(
                logprob_token_ids=logprobs.logprob_token_ids[places],
                logprobs=logprobs.logprobs[places],
                sampled_token_ranks=logprobs.sampled_token_ranks[places],
            )
        rows = output.routed_experts
        if rows is None:
            rows = np.zeros((count, 0))
        beyond = np.arange(begin, begin + len(rows), dtype=np.float64)
        rows = np.concatenate([rows, beyond[:, None]], axis=1)
        output.routed_experts = np.concatenate([rows[places], rows[count:]])
        if not (places or output.finished):
            outputs.remove(output)
