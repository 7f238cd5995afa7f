# SPDX-License-Identifier: Apache-2.0
"""Where a request's blocks, masks and canvas lie, and which rows its steps compute.

Integers only. A request exists twice, in the scheduler's process and in the worker's,
and both must agree on every position without asking each other. So both call `lay_out`
when they take a request in, and both call the functions below it for the rows of a
forward: the scheduler on one request's integers, the worker on tensors of many.

Text is decoded in blocks of B positions, counted from `origin`. The **canvas**, the row
of positions for the text to come, begins behind the tokens that are known. What
both sides agree on stands in this one file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_dlm.config.cache import FAR, Reach
from vllm_dlm.config.canvas import Canvas
from vllm_dlm.config.growth import Growth
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.request import RequestConfig

GRAPH_SEGMENTS = 2
"""Rows of attention that a whole CUDA graph has for each request
(`planning/attention.py`)."""


class Limits(NamedTuple):
    """What the server grants every request, in positions."""

    max_canvas: int
    """Widest canvas, with full attention."""
    max_model_len: int
    """Prompt and output together."""


@dataclass(frozen=True)
class RequestLayout:
    """What follows from a request's lengths, options and model alone; see `lay_out`.

    Positions are absolute: they count from the prompt's first token.
    """

    prompt_len: int
    num_known: int
    """Tokens that are there at (re-)admission: the prompt's, and those emitted before
    a preemption."""
    max_tokens: int
    limits: Limits
    is_full: bool
    """The model has full attention: a canvas is computed whole, and where it is
    narrower than the output, a further one follows."""
    block_length: int
    attended_length: int
    """Positions of a block as attention has it: `block_length`, or a part of it."""
    window: int
    """Positions from the active block's first on that are decided together: the block,
    and those behind it that the strategy may write too (`Strategy.looks_ahead`)."""
    verifies: bool
    """Each block is a position, and every second forward verifies what the one before
    has drafted (`Strategy.verifies`)."""
    sub_block_length: int
    origin: int
    """Position from which blocks are counted: 0 where the model was trained so (the
    prompt's last tokens may share the first block), else the prompt's length modulo B,
    so that a block begins where the prompt ends."""
    first_block: int
    """Start of the block that is active at (re-)admission."""
    first_mask: int
    """First position that is masked then."""
    leads_first: bool
    """The first forward computes the rows left of the first block alone, and decides
    that block's lead."""
    knows_lead: bool
    """The first block's lead is among the known tokens, and is not decided again."""
    text_end: int
    """End of the block in which the longest text ends, or of the context; of a canvas
    from the request, its end."""
    steps_per_block: int
    """Denoise steps of a block by the step schedule."""
    reach: Reach
    """The cache policy in numbers."""
    opens_alone: bool
    """A block's first step writes its first token alone (`sampling/opening.py`)."""
    growth: Growth
    """The growth policy in numbers."""
    canvas: Canvas | None = None
    """What the request has brought; None for masks alone."""

    @property
    def is_elastic(self) -> bool:
        """Whether the canvas's end moves to both sides while its hole is written."""
        return self.canvas is not None and self.canvas.is_elastic

    @property
    def num_emitted(self) -> int:
        """Output tokens that the scheduler has been handed at (re-)admission."""
        return self.num_known - self.prompt_len

    @property
    def first_step(self) -> int:
        """Denoise steps that the first block has had: deciding its lead was one.

        Where drafts are verified, the rows left of the block do so: without drafts.
        """
        return int(self.knows_lead or self.verifies)

    def block_at(self, position: int) -> int:
        """Start of the block that is active when all left of a position is text.

        It holds the position, which is not left of `origin`; or, where the request has
        written whole blocks itself, the first mask behind them.
        """
        first = next_hole(self.canvas, self.prompt_len, position)
        return block_start(first, self.block_length, self.origin)

    def is_written(self, position: int) -> bool:
        """Whether the request has written a position of its output itself."""
        return next_hole(self.canvas, self.prompt_len, position) != position

    def masks_end(self, position: int, number: int) -> int:
        """One past the mask of a number, counted from 1 at a position, where nothing
        behind it is decided; the canvas's end where there are fewer."""
        if self.canvas is None:
            return position + number
        offset = max(position - self.prompt_len, 0)
        end = self.canvas.nth_hole(offset, number) + 1
        return min(self.prompt_len + end, self.text_end)

    def attended_at(self, position: int) -> int:
        """Start of the block of attention that holds a position."""
        return block_start(position, self.attended_length, self.origin)

    @property
    def widest_step(self) -> int:
        """The most rows of a step that does not begin a block."""
        if not self.is_full:
            return self.block_length
        if self.reach.refresh_every == 1:
            return self.text_end
        widest = self.text_end - self.prompt_len
        return int(min(self.block_length + self.reach.right, widest) + self.reach.left)

    def canvas_from(self, num_tokens: int) -> int:
        """End of a canvas that is opened behind so many tokens.

        The references denoise whole blocks and cut afterwards: a canvas ends with a
        block, unless the context ends first. With full attention, where it is computed
        whole, it is at most `max_canvas` wide, and where it grows, it begins with
        `Growth.initial`.
        """
        if self.canvas is not None and self.is_elastic:
            return self.prompt_len + self.canvas.begun.width
        if not self.is_full or self.canvas is not None:
            return self.text_end
        width = canvas_width(
            min(self.prompt_len + self.max_tokens - num_tokens, self.growth.initial),
            self.block_length,
            self.limits.max_canvas,
        )
        return min(num_tokens + width, self.limits.max_model_len)


def lay_out(
    config: RequestConfig,
    model: ModelDefaults,
    limits: Limits,
    *,
    prompt_len: int,
    num_known: int,
    max_tokens: int,
) -> RequestLayout:
    """Lay out a request: a new one, or one that returns after a preemption.

    The active block of a request that returns is replayed whole, also where part of it
    was emitted. Two things in it stay: the prompt's last tokens, which may share it,
    and its lead, if that was emitted, because only the rows left of the block predict
    it, alone. Deciding it was the block's first step.

    Args:
        config: the request's options, `sized`; those of the second stage of `tccf` once
            the request is in it.
        model: what the model declares.
        limits: the server's.
        prompt_len: tokens of the prompt.
        num_known: tokens of the prompt and of the output so far.
        max_tokens: of the request's output.
    """
    length, attended, canvas = (
        config.block_length,
        config.attended_length,
        config.canvas,
    )
    if canvas is not None:
        max_tokens = canvas.width
    origin = model.origin(prompt_len, attended)
    if attended < length:
        # Several blocks are decided together, from the one with the first mask on.
        origin = block_start(prompt_len, attended, origin) % length
    first_hole = next_hole(canvas, prompt_len, num_known)
    first_block = block_start(first_hole, length, origin)
    begins_with_lead = bool(model.begins_with_lead(first_block, prompt_len))
    if begins_with_lead and next_hole(canvas, prompt_len, first_block) != first_block:
        begins_with_lead = False  # the request has written it
    knows_lead = begins_with_lead and num_known > first_block
    end = text_end(prompt_len + max_tokens, attended, origin)
    if canvas is not None:
        end = prompt_len + max_tokens
    is_full = not model.reuses_blocks
    is_elastic = canvas is not None and canvas.is_elastic
    steps = config.steps_per_block
    if steps is None:
        width = canvas_width(max_tokens, length, limits.max_canvas)
        steps = steps_per_block(config.steps, width, length)
    return RequestLayout(
        prompt_len=prompt_len,
        num_known=num_known,
        max_tokens=max_tokens,
        limits=limits,
        is_full=is_full,
        block_length=length,
        attended_length=attended,
        window=config.window,
        verifies=config.verifies,
        sub_block_length=config.sub_block_length,
        origin=origin,
        first_block=first_block,
        first_mask=max(first_block + knows_lead, prompt_len),
        # Of a canvas, whole blocks may be written before the first that is decided.
        leads_first=begins_with_lead and num_known <= first_block,
        knows_lead=knows_lead,
        text_end=min(end, limits.max_model_len),
        # One token per step for as long as it takes, if the hole is elastic.
        steps_per_block=FAR if is_elastic else min(steps, length),
        reach=config.reach(model.shift),
        opens_alone=config.opens_alone and is_full and model.shift == 1,
        growth=config.growth_policy.growth(),
        canvas=canvas,
    )


def next_hole(canvas: Canvas | None, prompt_len: int, position: int) -> int:
    """The first position from `position` on that its request has not written itself.

    One past the canvas where there is none.
    """
    if canvas is None or position >= prompt_len + canvas.width:
        return position
    if canvas.is_elastic:
        # What is written moves: all of it is one block, whatever stands where.
        return position
    return prompt_len + canvas.next_hole(max(position - prompt_len, 0))


def block_start(num_tokens: int, block_length: int, origin: int) -> int:
    """Position of the first token of the block that holds position `num_tokens`.

    Args:
        num_tokens: tokens so far, the prompt's included.
        origin: where blocks are counted from, at most `num_tokens`.
    """
    return origin + (num_tokens - origin) // block_length * block_length


def text_end(num_tokens: int, block_length: int, origin: int) -> int:
    """End of the block that holds the last of `num_tokens` tokens."""
    return block_start(num_tokens + block_length - 1, block_length, origin)


def canvas_width(num_tokens: int, block_length: int, max_canvas: int) -> int:
    """Width of the next canvas of a request with full attention, in whole blocks.

    It is the wanted number of tokens rounded up to the block, at most `max_canvas`
    rounded down to it (but one block at least).
    """
    widest = max(max_canvas // block_length, 1) * block_length
    return min(-(-num_tokens // block_length) * block_length, widest)


def steps_per_block(steps: int | None, width: int, block_length: int) -> int:
    """Denoise steps of one block under a budget for the whole canvas.

    LLaDA splits `steps` evenly over the blocks; None is one token per step. More steps
    than positions would leave steps without work, so B is the most.
    """
    if steps is None:
        return block_length
    num_blocks = max(width // block_length, 1)
    return min(max(steps // num_blocks, 1), block_length)


def scheduled_steps(
    masks: int, layout: RequestLayout, model: ModelDefaults, *, begins_with_lead: bool
) -> int:
    """Steps of one block, if each writes as many masks as the step schedule says.

    `sampling/views.py` counts out the same, from the masks that are left.

    Args:
        masks: that the block begins with.
        layout: of its request.
        model: what the model declares.
        begins_with_lead: the block's first step writes its lead.
    """
    budget = layout.steps_per_block
    whole = layout.block_length if model.reuses_blocks else masks
    masks -= begins_with_lead
    for step in range(begins_with_lead, budget - 1):
        if model.schedule == "rounded":
            share = round(masks / (budget - step))
        else:
            share = whole // budget + (step < whole % budget)
        masks -= max(share, 1)
        if masks <= 0:
            return step + 1
    return budget


# -- rows of a forward ---------------------------------------------------------


class Rows(NamedTuple):
    """One request's rows of a forward, in absolute positions."""

    start: int
    """First position computed."""
    end: int
    """One past the last position computed."""


ALWAYS = -1
"""Instead of the frontier of the last refresh: all further steps of the block are
refreshes."""


def refreshes(reach: Reach, step: Any, is_first_block: Any, phase: Any) -> Any:
    """Whether a step is a refresh; of one request or, tensors, of many.

    Args:
        step: denoise steps that the active block has had.
        is_first_block: it is its request's first.
        phase: first position that was not final before the last refresh, or `ALWAYS`.
    """
    warms_up = is_first_block & (step < reach.first_refreshes)
    return (step % reach.refresh_every == 0) | warms_up | (phase == ALWAYS)


def next_start(
    reach: Reach, step: Any, is_first_block: Any, block_start: Any, phase: Any
) -> Any:
    """First row of `plan_rows`; of one request or, tensors [R], of many.

    Args:
        step, is_first_block, phase: as in `refreshes`.
        block_start: absolute position of the active block's first token.
    """
    start = block_start + reach.follows * (phase - block_start) - reach.left
    is_refresh = refreshes(reach, step, is_first_block, phase)
    return start * (start > 0) * (is_refresh == 0)


def plan_rows(
    reach: Reach,
    *,
    step: int,
    is_first_block: bool,
    block_start: int,
    block_length: int,
    phase: int,
    masks_end: int | None,
    canvas_end: int,
) -> Rows:
    """Rows to compute in the next forward of a request with full attention.

    Args:
        reach: the request's policy.
        step: denoise steps that the active block has had.
        is_first_block: it is the request's first.
        block_start: absolute position of the active block's first token.
        block_length: B; the last block of a canvas may be shorter.
        phase: as in `refreshes`.
        masks_end: where the worker says that the rows end (`Advance`), because the
            masks that they reach to are known to it; None for the canvas's end. Of a
            block's first step, where the rows end if not everything is masked.
        canvas_end: one past the canvas's last position.
    """
    start = next_start(reach, step, is_first_block, block_start, phase)
    is_refresh = refreshes(reach, step, is_first_block, phase)
    right = reach.refresh_right if is_refresh else reach.right
    if not reach.follows:
        end = block_start + block_length + right
    elif step == 0 and masks_end is None:
        end = block_start + right  # All of the block is masked.
    else:
        end = canvas_end if masks_end is None else masks_end
    return Rows(start, min(end, canvas_end))


def part_start(reach: Reach, block_start: Any, frontier: Any) -> Any:
    """First row of `part_rows`; of one request or, tensors [R], of many."""
    inside = (frontier - block_start) % reach.part
    return block_start + (inside > 0) * (frontier - block_start - inside)


def part_rows(reach: Reach, *, block_start: int, block_end: int, frontier: int) -> Rows:
    """Rows of the active block to compute in the next forward; not with full attention.

    Args:
        reach: the request's policy.
        block_start, block_end: the block, as far as the canvas goes.
        frontier: first position that is not final; `block_start` in the block's first
            step, which computes it whole.
    """
    start = part_start(reach, block_start, frontier)
    is_whole = (frontier - block_start) % reach.part == 0
    return Rows(start, block_end if is_whole else min(start + reach.part, block_end))


def verified_rows(*, length: int, block_start: int, canvas_end: int) -> Rows:
    """Rows of a draft and of its verification: the text's last token, and masks.

    Args:
        length: positions that are drafted and verified at a time.
        block_start: the first mask.
        canvas_end: one past the canvas's last position.
    """
    start = block_start - 1
    return Rows(start, min(start + length, canvas_end))


def usual_rows(
    config: RequestConfig, model: ModelDefaults, *, blocks: int = 1
) -> int | None:
    """How many rows a step in the middle of a block has, if all have as many.

    A step has fewer where the canvas, the text or the context ends, and more where a
    block begins. None where the rows move with the text, or reach to the canvas's end
    or into blocks to come, and where several blocks have more segments than a whole
    CUDA graph has room for.

    Args:
        config: a request's options, `sized`.
        model: what the model declares.
        blocks: that a step computes, where blocks are reused.
    """
    reach, length = config.reach(model.shift), config.block_length
    if config.window > length:
        return None
    if model.reuses_blocks:
        is_whole = reach.part >= length and config.attended_length == length
        return blocks * length if is_whole else None
    if reach.follows or reach.right >= FAR:
        return None
    return int(reach.left + length + reach.right)
