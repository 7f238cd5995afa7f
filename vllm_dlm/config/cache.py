# SPDX-License-Identifier: Apache-2.0
"""KV policies: which rows a step recomputes.

With full attention every token's keys and values depend on the whole canvas, so only
`none` is exact. The other policies compute all of the canvas, or all that they look at,
in a block's first step (a refresh), and less of it in later steps (`POLICIES`). What a
policy remembers begins anew with each block, so that a preempted request, which replays
its block, computes the same rows again.

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
    A refresh computes all from the prompt's start to `refresh_right` positions behind
    the active block; other steps compute the rows from `left` before the block to
    `right` behind it. With `follows` both move with the text: a refresh ends with the
    mask of number `refresh_right`, counted from the left, and other steps compute the
    rows from `left` before the frontier of the last refresh to the mask of number
    `right`, and only these first masks are written. The frontier is the first position
    that is not final. All that was computed is seen.

    With block or causal attention, a step computes the active block. If the frontier is
    inside a sub-block of `part` positions, whose first token is written then, the step
    computes that sub-block alone, unless it is the block's first.
    """

    refresh_every: Any = FAR
    first_refreshes: Any = 0
    follows: Any = False
    left: Any = 0
    right: Any = FAR
    refresh_right: Any = FAR
    ends_early: Any = False
    """Once the canvas was cut, all further steps of the block are refreshes."""
    part: Any = FAR
    """Positions of a sub-block, counted from the block's start."""


class CachePolicy(BaseModel):
    """Base class of policies; the fields of a policy are the option `cache_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opens_alone: ClassVar[bool] = False
    """Whether the authors' code, for models with a shift, writes a block's first token
    from the refresh, alone: then no row left of that is computed until the next."""

    counts_masks: ClassVar[bool] = False
    """Whether its rows reach to masks of certain numbers (`Reach.follows`)."""

    @property
    def stops_early(self) -> bool:
        """Whether a token written that ends the text ends the canvas."""
        return False

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

    Window-Diffusion, arXiv 2601.20332 (docs/caches.md).
    """

    opens_alone = True
    counts_masks = True

    active_window: int = Field(
        default=16,
        ge=1,
        le=FAR,
        description="Masks, counted from the left, that a step computes and may write.",
    )
    external_window: int = Field(
        default=64,
        ge=1,
        le=FAR,
        description="Masks that a refresh computes; what lies behind them is neither "
        "computed nor seen. At least `active_window`.",
    )
    refresh_every: int = Field(
        default=32,
        ge=1,
        le=FAR,
        description="Steps of a block from one that computes all that is seen to the "
        "next.",
    )
    early_stop: bool = Field(
        default=False,
        description="End the canvas with the first token written that ends the text; "
        "steps behind that are refreshes.",
    )

    @property
    def stops_early(self) -> bool:
        """See `CachePolicy`."""
        return self.early_stop

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
            refresh_right=self.external_window
            - (self.active_window if reads_block else 0),
            ends_early=self.early_stop,
        )


Cache = Literal["none", "prefix", "dual", "vicinity", "window"]

POLICIES: dict[Cache, type[CachePolicy]] = {
    "none": Exact,
    "prefix": Prefix,
    "dual": Dual,
    "vicinity": Vicinity,
    "window": Window,
}
