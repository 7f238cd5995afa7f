# SPDX-License-Identifier: Apache-2.0
"""KV policies: which rows a step recomputes.

With full attention every token's keys and values depend on the whole canvas, so only
`none` is exact. The other policies compute all of the canvas in a block's first step (a
refresh), and less of it in later steps (`POLICIES`). What a policy remembers begins
anew with each block, so that a preempted request, which replays its block, computes the
same rows again.

With block or causal attention the KV of a finished block is final, and a forward
computes what is not final yet, up to the active block's end. Where a block is written
in sub-blocks, `dual` computes less than the block.

This file holds the policies, as users set them and as numbers (`Reach`). The rows that
follow from these numbers are computed in `model_executor/layout.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

FAR = 1 << 30
"""A number of positions, or of steps, beyond any that a request can have."""


class Reach(NamedTuple):
    """A policy in numbers: integers for one request, tensors [R] for many.

    With full attention, step s of a block is a refresh if s is a multiple of
    `refresh_every`, and in the request's first block also while s < `first_refreshes`.
    Other steps compute the rows from `left` before their anchor's beginning to `right`
    behind its end. The anchor is the active block or, with `follows`, the span from the
    frontier of the step before to the frontier now. The frontier is the first position
    that is not final.

    With block or causal attention, a step computes the active block. If the frontier is
    inside a sub-block of `part` positions, whose first token is written then, the step
    computes that sub-block alone, unless it is the block's first.
    """

    refresh_every: Any = FAR
    first_refreshes: Any = 0
    follows: Any = False
    left: Any = 0
    right: Any = FAR
    keys: Any = FAR
    """Keys that rows see behind the last row computed."""
    part: Any = FAR
    """Positions of a sub-block, counted from the block's start."""


class CachePolicy(BaseModel):
    """Base class of policies; the fields of a policy are the option `cache_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opens_alone: ClassVar[bool] = False
    """Whether the authors' code, for models with a shift, writes a block's first token
    from the refresh, alone: then no row left of the block is computed after that."""

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """Return the policy in numbers, for one request.

        Args:
            shift: with 1, the row left of a position predicts it, and is computed too.
            reads_block: the request's strategy reads decided positions too, or
                rewrites them: rows must cover the block.
            part: positions of a sub-block.
        """
        raise NotImplementedError


class Exact(CachePolicy):
    """Every step computes prompt and canvas, as the model defines."""

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(refresh_every=1)


class Prefix(CachePolicy):
    """A step computes the block and all right of it; keys left of the block stay.

    Fast-dLLM, arXiv 2505.22618.
    """

    opens_alone = True

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(left=shift)


class Dual(CachePolicy):
    """A step computes the block; keys on both sides of the block stay.

    Fast-dLLM, arXiv 2505.22618. Where finished blocks are final and written in
    sub-blocks, a step computes a sub-block: `use_block_cache` of Fast-dLLM v2,
    arXiv 2509.26328.
    """

    opens_alone = True

    def reach(self, shift: int, reads_block: bool, part: int = FAR) -> Reach:
        """See `CachePolicy`."""
        return Reach(left=shift, right=0, part=FAR if reads_block else part)


class Vicinity(CachePolicy):
    """A step computes the block and some positions on both sides; other keys stay.

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
    """A step computes a window that moves with the text and sees a wider one.

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
