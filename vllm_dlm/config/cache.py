# SPDX-License-Identifier: Apache-2.0
"""KV policies: which rows a step recomputes.

In a full-attention (class A) model every token's keys and values depend on the whole
canvas, so only `none` is exact. The others compute all of it in a block's first step (a
refresh), then less (`POLICIES`). Whatever they remember begins anew with each block, so
that a preempted request, which replays its block, computes the same rows again.

In models of the other classes the KV of a finished block is final, and a forward
computes what is not final yet, up to the active block's end. Where a block is written
in sub-blocks, `dual` computes less of it too.

Which rows follow from a policy says `model_executor/layout.py`.
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
