# SPDX-License-Identifier: Apache-2.0
"""Growing canvases: how wide a canvas is at first, and when it becomes wider.

With full attention a canvas is computed whole, so one that is wide enough for the
longest answer is mostly padding. A growing canvas begins with a few blocks. Each block
begins with a look at the rest of the canvas: while too little of it is the end of the
text, the canvas becomes wider, and the forward writes nothing.

This file holds the policies, as users set them and as numbers (`Growth`); how much a
canvas grows is computed in `model_executor/sampling/growth.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from vllm_dlm.config.cache import FAR

MOST = 1 << 20
"""Largest number of positions that a parameter may be."""


class Growth(NamedTuple):
    """A policy in numbers.

    A canvas grows where the share of ends of text in it is below `threshold`. With
    `window` positions, that is the confidence of the rightmost so many masks that are
    predicted to be ends, over `window`. Without (0), it is how many of all masks are.
    """

    initial: int = FAR
    """Positions of a canvas that is opened; rounded up to whole blocks."""
    expansion: int = 0
    """Positions that it grows by, at least, rounded up to whole blocks; 0 for never."""
    window: int = 0
    threshold: float = 0.0


class GrowthPolicy(BaseModel):
    """Base class of policies; a policy's fields are the option `growth_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def growth(self) -> Growth:
        """Return the policy in numbers."""
        raise NotImplementedError


class NoGrowth(GrowthPolicy):
    """A canvas is as wide as the output that is wanted."""

    def growth(self) -> Growth:
        """See `GrowthPolicy`."""
        return Growth()


class _Growing(GrowthPolicy):
    initial: int = Field(
        default=64, ge=1, le=MOST, description="Positions of a canvas at first."
    )
    expansion: int = Field(
        default=8, ge=1, le=MOST, description="Positions that a canvas grows by."
    )


class Daedal(_Growing):
    """A canvas grows until its last positions are surely the end of the text.

    DAEDAL's initial length adjustment, arXiv 2508.00819, in front of every block.
    """

    window: int = Field(
        default=32, ge=1, le=MOST, description="Ends of text that are looked at."
    )
    threshold: float = Field(
        default=0.5, gt=0, le=1, description="Mean confidence that is enough."
    )

    def growth(self) -> Growth:
        """See `GrowthPolicy`."""
        return Growth(self.initial, self.expansion, self.window, self.threshold)


class RhoEos(_Growing):
    """A canvas grows until enough of its masks are predicted to be ends of text.

    The expansion of rho-EOS, arXiv 2601.22527: the further away that is, the more.
    """

    threshold: float = Field(
        default=0.4, gt=0, le=1, description="Share of the masks that is enough."
    )

    def growth(self) -> Growth:
        """See `GrowthPolicy`."""
        return Growth(self.initial, self.expansion, 0, self.threshold)


GrowthName = Literal["none", "daedal", "rho_eos"]

GROWTHS: dict[GrowthName, type[GrowthPolicy]] = {
    "none": NoGrowth,
    "daedal": Daedal,
    "rho_eos": RhoEos,
}
