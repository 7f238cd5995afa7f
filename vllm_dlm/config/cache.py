# SPDX-License-Identifier: Apache-2.0
"""KV policies: which rows a step recomputes.

In a full-attention (class A) model every token's keys and values depend on the whole
canvas, so only `none` is exact. The others compute all of it in a block's first step (a
refresh), then less (`POLICIES`). Whatever they remember begins anew with each block, so
that a preempted request, which replays its block, computes the same rows again.

In models of the other classes the KV of a finished block is final, and a forward
computes what is not final yet, up to the active block's end. Where a block is written
in sub-blocks, `dual` computes less of it too (`part_rows`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

FAR = 1 << 30
"""Positions; further than any canvas reaches."""


class Reach(NamedTuple):
    """A policy in numbers, of one request or, as tensors [R], of many.

    Class A. Step s of a block is a refresh if s is a multiple of `refresh_every`, and
    in the request's first block also while s < `first_refreshes`. Other steps compute
    the rows from `left` before their anchor's beginning to `right` behind its end. The
    anchor is the active block or, with `follows`, the span from the frontier of the
    step before to the frontier now: the first position that is not final.

    Other classes. A step computes the active block. If the frontier is inside a
    sub-block of `part` positions, whose first token is written then, it computes that
    sub-block alone; not in the block's first step.
    """

    refresh_every: Any = FAR
    first_refreshes: Any = 0
    follows: Any = False
    left: Any = 0
    right: Any = FAR
    keys: Any = FAR
    """Keys that are seen behind the last row computed."""
    part: Any = FAR
    """Positions of a sub-block, counted from the block's start."""


class CachePolicy(BaseModel):
    """Base of a policy; its fields are the option `cache_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opens_alone: ClassVar[bool] = False
    """Whether its authors' code for models with a shift writes a block's first token
    from the refresh, alone: then no row left of the block is computed after it."""

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """The policy in numbers.

        Args:
            shift: with 1, a position is predicted by the row to its left, which is
                computed along.
            reads_block: the request's strategy reads decided positions too, or
                rewrites them: rows must cover the block.
            part: positions of a sub-block.
        """
        raise NotImplementedError


class Exact(CachePolicy):
    """Every step computes prompt and canvas: what the model defines."""

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(refresh_every=1)


class Prefix(CachePolicy):
    """The block and all right of it are computed; keys left of it stay.

    Fast-dLLM, arXiv 2505.22618.
    """

    opens_alone = True

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(left=shift)


class Dual(CachePolicy):
    """The block is computed; keys on both sides of it stay.

    Fast-dLLM, arXiv 2505.22618. Where blocks are written in sub-blocks and what is
    finished is final, the sub-block is: Fast-dLLM v2's `use_block_cache`, 2509.26328.
    """

    opens_alone = True

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(left=shift, right=0, part=FAR if reads_block else part)


class Vicinity(CachePolicy):
    """The block and some positions on both sides are computed; other keys stay.

    dInfer, arXiv 2510.08666.
    """

    look_back: int = Field(
        default=16, ge=0, le=FAR, description="Positions computed left of the block."
    )
    look_ahead: int = Field(
        default=16, ge=0, le=FAR, description="Positions computed right of the block."
    )
    warmup_steps: int = Field(
        default=4,
        ge=0,
        le=FAR,
        description="Steps of a request's first block that compute everything, before "
        "the one that each block begins with.",
    )

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(
            first_refreshes=self.warmup_steps + 1,
            left=max(self.look_back, shift),
            right=self.look_ahead,
        )


class Window(CachePolicy):
    """A window that moves with the text is computed, and sees a wider one.

    Window-Diffusion, arXiv 2601.20332, with contiguous windows (docs/caches.md).
    """

    active_window: int = Field(
        default=16,
        ge=1,
        le=FAR,
        description="Positions computed from the first one on that is not final; only "
        "these can be written.",
    )
    external_window: int = Field(
        default=64,
        ge=1,
        le=FAR,
        description="Positions seen from there on; at least `active_window`.",
    )
    refresh_every: int = Field(
        default=32,
        ge=1,
        le=FAR,
        description="Steps of a block from one that computes everything to the next.",
    )

    @model_validator(mode="after")
    def _see_what_is_computed(self) -> Window:
        if self.external_window < self.active_window:
            raise ValueError(
                f"external_window {self.external_window} must be at least "
                f"active_window {self.active_window}"
            )
        return self

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(
            refresh_every=self.refresh_every,
            follows=not reads_block,
            left=shift,
            right=0 if reads_block else self.active_window,
            keys=self.external_window - self.active_window,
        )


Cache = Literal["none", "prefix", "dual", "vicinity", "window"]

POLICIES: dict[Cache, type[CachePolicy]] = {
    "none": Exact,
    "prefix": Prefix,
    "dual": Dual,
    "vicinity": Vicinity,
    "window": Window,
}


class Rows(NamedTuple):
    """One request's rows of a forward, in absolute positions."""

    start: int
    """First position computed."""
    end: int
    """One past the last position computed."""


def refreshes(reach: Reach, step: Any, is_first_block: Any) -> Any:
    """Whether a step computes prompt and canvas; of one request or, tensors, of many.

    Args:
        step: denoise steps that the active block has had.
        is_first_block: it is its request's first.
    """
    warms_up = is_first_block & (step < reach.first_refreshes)
    return (step % reach.refresh_every == 0) | warms_up


def next_start(
    reach: Reach, step: Any, is_first_block: Any, block_start: Any, frontier: Any
) -> Any:
    """First row of the next forward; of one request or, tensors [R], of many.

    Scheduler and worker both ask here.

    Args:
        step, is_first_block: as in `refreshes`.
        block_start: absolute position of the active block's first token.
        frontier: first position that was not final before the block's last step.
    """
    start = block_start + reach.follows * (frontier - block_start) - reach.left
    return start * (start > 0) * (refreshes(reach, step, is_first_block) == 0)


def plan_rows(
    reach: Reach,
    *,
    step: int,
    is_first_block: bool,
    block_start: int,
    block_length: int,
    frontiers: tuple[int, int],
    canvas_end: int,
) -> Rows:
    """Rows to compute in the next forward of a class A request.

    Args:
        reach: the request's policy.
        step: denoise steps that the active block has had.
        is_first_block: it is the request's first.
        block_start: absolute position of the active block's first token.
        block_length: B; the last block of a canvas may be shorter.
        frontiers: first position not final, before the block's last step and now.
        canvas_end: one past the canvas' last position.
    """
    start = next_start(reach, step, is_first_block, block_start, frontiers[0])
    if refreshes(reach, step, is_first_block):
        return Rows(start, canvas_end)
    end = frontiers[1] if reach.follows else block_start + block_length
    return Rows(start, min(end + reach.right, canvas_end))


def part_start(reach: Reach, block_start: Any, frontier: Any) -> Any:
    """First row of `part_rows`; of one request or, tensors [R], of many.

    Scheduler and worker both ask here.
    """
    inside = (frontier - block_start) % reach.part
    return block_start + (inside > 0) * (frontier - block_start - inside)


def part_rows(reach: Reach, *, block_start: int, block_end: int, frontier: int) -> Rows:
    """Rows of the active block to compute in the next forward; not in class A.

    Args:
        reach: the request's policy.
        block_start, block_end: the block, as far as the canvas goes.
        frontier: first position that is not final; `block_start` in the block's first
            step, which computes it whole.
    """
    start = part_start(reach, block_start, frontier)
    is_whole = (frontier - block_start) % reach.part == 0
    return Rows(start, block_end if is_whole else min(start + reach.part, block_end))


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
    """Width of the next canvas of a request, in whole blocks.

    The references denoise whole blocks and cut afterwards, so the width is the wanted
    number of tokens rounded up to the block, at most `max_canvas` rounded down to it
    (but one block at least).
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
