# SPDX-License-Identifier: Apache-2.0
"""Moving: what a step makes of a canvas whose hole widens and narrows.

Of what is written in a step, an end of text (or a token that pads one) takes its
position away, and the token that widens becomes two masks. What is right of them moves,
and with it the canvas's end. Fixed-shape tensor operations: no step waits for the
device. Source: DreamOn, arXiv 2602.01326, and its published loop. Where several tokens
widen in one step and not all have room, the others become masks again; there, what lies
behind would be cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_dlm.model_executor.sampling.advance import Canvas

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import Blocks
    from vllm_dlm.model_executor.sampling.safety import SafeDecision
    from vllm_dlm.model_executor.slots import RequestSlots
    from vllm_dlm.strategies.base import View


class Moved(NamedTuple):
    """Canvases [R, B] after a step has moved them."""

    tokens: torch.Tensor
    """[R, B] int64; the mask id where masked, and behind the canvas."""
    masked: torch.Tensor
    """[R, B] bool; also behind the canvas."""
    length: torch.Tensor
    """[R] int64: positions of each canvas."""
    widened: torch.Tensor
    """[R] int64: positions that have become two."""


def moved(
    tokens: torch.Tensor,
    masked: torch.Tensor,
    exists: torch.Tensor,
    goes: torch.Tensor,
    widens: torch.Tensor,
    room: torch.Tensor,
    budget: torch.Tensor,
    mask_id: int,
) -> Moved:
    """Take positions away, and make two masks of others.

    Args:
        tokens: [R, B] int64, as the step has written them.
        masked: [R, B] bool: what it has left masked.
        exists: [R, B] bool: the canvas: the first positions of each row.
        goes: [R, B] bool: positions that go.
        widens: [R, B] bool: positions that are to be two masks; none of those that go.
        room: [R] int64: positions that the canvas may gain, 0 or more, if none goes.
        budget: [R] int64: how many may become two, 0 or more.
    """
    width = tokens.shape[1]
    most = torch.minimum(room + goes.sum(dim=1), budget)
    two = widens & (widens.cumsum(dim=1) <= most[:, None])
    masked = (masked | widens) & exists
    counts = torch.where(exists, 1 + two.long() - goes.long(), 0)
    place = counts.cumsum(dim=1) - counts
    # What goes nowhere is put behind the last column.
    first = torch.where(exists & ~goes, place, width)
    second = torch.where(two, place + 1, width)
    tokens = torch.where(masked, mask_id, tokens)

    def put(values: torch.Tensor, missing: int | bool) -> torch.Tensor:
        row = values.new_full((len(values), width + 1), missing)
        row.scatter_(1, first, values)
        row.scatter_(1, second, torch.full_like(values, missing))
        return row[:, :width]

    return Moved(
        put(tokens, mask_id), put(masked, True), counts.sum(dim=1), two.sum(dim=1)
    )


def write_moved(
    table: RequestSlots,
    facts: EngineFacts,
    view: View,
    decision: SafeDecision,
    blocks: Blocks,
) -> Canvas:
    """Write tokens and masks of requests with an elastic hole, in place of `Advance`.

    Each of their blocks is a whole canvas, at its longest.

    Args:
        decision: one that writes masks, and changes nothing else.
    """
    elastic, pins, slots = table.elastic, table.pins, blocks.slots
    assert elastic is not None and pins is not None
    commit, mask_id = decision.commit, facts.mask_id
    tokens = torch.where(commit, decision.new_tokens, view.tokens)
    after = moved(
        tokens,
        view.masks & ~commit,
        blocks.valid,
        commit & elastic.closes(tokens, slots),
        commit & (tokens == facts.defaults.expand_token),
        elastic.room(blocks),
        elastic.budget[slots],
        mask_id,
    )
    elastic.budget[slots] -= after.widened
    # All positions of the blocks, for the canvas may reach beyond what was computed.
    rows = slots[:, None]
    table.tokens[rows, blocks.places] = after.tokens.to(table.tokens.dtype)
    table.masked[rows, blocks.places] = after.masked
    end = blocks.positions[:, 0] + after.length
    pins.move_handed_end(slots, end - elastic.hidden[slots])
    exists = blocks.positions < end[:, None]
    return Canvas(after.tokens, exists, after.masked, after.masked & exists, end)
