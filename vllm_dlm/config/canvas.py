# SPDX-License-Identifier: Apache-2.0
"""A canvas from the request: text with holes, of which the model fills the holes.

`CanvasOptions` is what a request may set, `Canvas` what becomes of it: plain token ids,
and where the holes are. This module and the layout of a request
(`model_executor/layout.py`) say on the host which positions are written from the start;
`model_executor/pins.py` says it on the device. Offsets count from the canvas's first
position, which is the output's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_dlm.messages import OptionError
from vllm_dlm.option_types import Count, read_json

Ids = Annotated[list[Count], Field(fail_fast=True), BeforeValidator(read_json)]


def _text_or_ids(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        return value
    raise ValueError("expected a text or a list of token ids")


class CanvasOptions(BaseModel):
    """Options by which a request brings a canvas; no server has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    canvas: Ids | None = Field(
        default=None,
        description="The output as token ids, with the model's mask id wherever the "
        "model shall write. Its length is `max_tokens`.",
    )
    canvas_text: str | None = Field(
        default=None,
        description="The output as a text with holes: `{{12}}` is a hole of twelve "
        "tokens, `{{city:4}}` one with a name, `<|mask|>` one of a single token.",
    )
    suffix: Annotated[str | list[Count], BeforeValidator(_text_or_ids)] | None = Field(
        default=None,
        description="A text (or token ids) that follows the output, of `max_tokens` "
        "tokens: the model fills the gap between prompt and suffix.",
    )
    pinned: bool | None = Field(
        default=None,
        description="Whether written positions stay as they are (the default). With "
        "false, strategies that rewrite may change those that share a block with a "
        "hole.",
    )
    holes: Literal["exact", "shrink", "elastic"] | None = Field(
        default=None,
        description="`exact` (the default): a hole is filled to its last position. "
        "`shrink`: a hole closes where the model writes an end of text or a pad token "
        "in it, and what is behind that in the hole is left out of the answer. "
        "`elastic`, of models that ask for places (DreamOn): the one hole begins with "
        "`initial_hole` masks and widens and narrows while it is written, up to the "
        "length that it is given.",
    )
    initial_hole: Annotated[Count, Field(ge=1)] | None = Field(
        default=None,
        description="With how many masks an elastic hole begins: 4 by default, and no "
        "more than it may have.",
    )


CANVAS_OPTIONS = tuple(CanvasOptions.model_fields)
"""Names of the options of a request that no server has."""

SOURCES = ("canvas", "canvas_text", "suffix")
"""Those that bring a canvas; a request has one of them at most."""


@dataclass(frozen=True)
class Canvas:
    """A canvas as the engine has it: W positions, some of which are holes."""

    tokens: tuple[int, ...]
    """[W]: what is written; of no meaning in holes."""
    holes: tuple[tuple[int, int], ...]
    """(first offset, length) of each hole, from left to right. They may touch."""
    pinned: bool = True
    """No strategy may change what is written."""
    shrinks: bool = False
    """The option `holes` is "shrink"."""
    handed: int | None = None
    """How many tokens are handed out, from the left; None for all. What is behind
    them (a suffix) is seen by the model alone."""
    initial: int | None = None
    """The one hole is elastic, and begins with so many masks; its length is the most
    that it may have. None for holes of fixed lengths."""

    @property
    def is_elastic(self) -> bool:
        """Whether the hole widens and narrows while it is written."""
        return self.initial is not None

    @cached_property
    def begun(self) -> Canvas:
        """The canvas as it is when nothing is written yet: itself, but where the hole
        is elastic."""
        if self.initial is None:
            return self
        ((start, length),) = self.holes
        tokens = self.tokens[: start + self.initial] + self.tokens[start + length :]
        handed = None if self.handed is None else start + self.initial
        hole = (start, self.initial)
        return replace(self, tokens=tokens, holes=(hole,), handed=handed, initial=None)

    @property
    def hidden(self) -> int:
        """Positions at the canvas's end that are not handed out."""
        return self.width - self.max_tokens

    @property
    def most_widenings(self) -> int:
        """How often an elastic hole may widen: DreamOn's `expand_budget`, twice the
        positions of hole and suffix at the most."""
        return 2 * (self.width - self.holes[0][0])

    @property
    def width(self) -> int:
        """W."""
        return len(self.tokens)

    @property
    def max_tokens(self) -> int:
        """Tokens that are handed out at most."""
        return self.width if self.handed is None else self.handed

    @cached_property
    def is_hole(self) -> np.ndarray:
        """[W] bool."""
        holes = np.zeros(self.width, dtype=bool)
        for start, length in self.holes:
            holes[start : start + length] = True
        return holes

    @cached_property
    def hole_at(self) -> np.ndarray:
        """[masks + 1] int64: offset of each mask, from left to right; last W."""
        return np.append(self.is_hole.nonzero()[0], self.width)

    @cached_property
    def holes_before(self) -> np.ndarray:
        """[W + 1] int64: how many masks there are left of each offset."""
        return np.concatenate([[0], np.cumsum(self.is_hole)])

    @cached_property
    def pins_end(self) -> int:
        """One past the last written offset: only from there on may the text end."""
        written = (~self.is_hole).nonzero()[0]
        return int(written[-1]) + 1 if len(written) else 0

    @cached_property
    def longest_written(self) -> int:
        """Length of the longest run of written positions."""
        return int(np.diff(self.hole_at, prepend=-1).max()) - 1

    @property
    def handed_along(self) -> int:
        """Written tokens that are handed out along with a block at most: the run before
        the first block that is decided, and the one behind it."""
        return 2 * self.longest_written

    def next_hole(self, offset: int) -> int:
        """The first mask at or behind an offset from 0 to W; W where there is none."""
        return int(self.hole_at[self.holes_before[offset]])

    def nth_hole(self, offset: int, number: int) -> int:
        """The mask of a number, counted from 1 at an offset; W where there is none."""
        last = len(self.hole_at) - 1
        return int(self.hole_at[min(self.holes_before[offset] + number - 1, last)])

    @classmethod
    def of_ids(cls, ids: Sequence[int], mask_id: int, **more: Any) -> Canvas:
        """A canvas of ids, with holes where they are the mask id.

        Masks that follow each other are one hole.
        """
        is_mask = np.array([token == mask_id for token in ids], dtype=bool)
        edges = np.diff(np.concatenate([[False], is_mask, [False]]).astype(np.int8))
        (starts,), (ends,) = (edges == 1).nonzero(), (edges == -1).nonzero()
        holes = zip(starts.tolist(), (ends - starts).tolist(), strict=True)
        return cls(tuple(int(token) for token in ids), tuple(holes), **more)

    def to_plain(self) -> dict[str, Any]:
        """As messages between processes can hold it."""
        return {
            "tokens": list(self.tokens),
            "holes": [list(hole) for hole in self.holes],
            "pinned": self.pinned,
            "shrinks": self.shrinks,
            "handed": self.handed,
            "initial": self.initial,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Canvas:
        """What `to_plain` was made of."""
        holes = tuple((start, length) for start, length in plain["holes"])
        return cls(**{**plain, "tokens": tuple(plain["tokens"]), "holes": holes})


CanvasBuilder: TypeAlias = Callable[[CanvasOptions, Mapping[str, str]], Canvas]
"""Of a request's options and the names that they were set under."""

MOVES_TOKENS = ("levenshtein",)
"""Strategies that delete and insert positions."""


def source_of(options: CanvasOptions) -> str | None:
    """The option that brings the canvas, if one does."""
    return next((n for n in SOURCES if getattr(options, n) is not None), None)


def refuse_without_canvas(options: CanvasOptions, names: Mapping[str, str]) -> None:
    """Refuse what would be ignored, and two canvases of one request.

    Raises:
        OptionError: it names the option.
    """
    given = [name for name in CANVAS_OPTIONS if getattr(options, name) is not None]
    sources = [name for name in SOURCES if name in given]
    if len(sources) > 1:
        raise OptionError(
            f"{names[sources[0]]} and {names[sources[1]]} each bring a canvas: set one "
            "of them",
            names[sources[1]],
        )
    if given and not sources:
        raise OptionError(
            f"{names[given[0]]} says how a canvas is filled, and there is none: set "
            "canvas, canvas_text or suffix beside it, or leave it out",
            names[given[0]],
        )
    if options.initial_hole is not None and options.holes != "elastic":
        name = names["initial_hole"]
        raise OptionError(
            f"{name} says how an elastic hole begins, and none is; set holes to "
            "'elastic', or leave it out",
            name,
        )


def check_combination(
    options: CanvasOptions,
    names: Mapping[str, str],
    strategy: str,
    verifies: bool,
    combined: Mapping[str, bool],
) -> None:
    """Refuse what cannot be combined with a canvas from the request.

    Args:
        options: which bring a canvas.
        names: option -> the name that it was set under.
        strategy: the request's.
        verifies: whether that is `Strategy.verifies`.
        combined: option -> whether it is on, of those that cannot be.

    Raises:
        OptionError: it names the remedy.
    """
    source = source_of(options)
    assert source is not None
    set_as = names[source]
    if strategy in MOVES_TOKENS or verifies:
        why = (
            "writes from left to right, token by token"
            if verifies
            else "deletes and inserts tokens, so that none stays in its place"
        )
        raise OptionError(
            f"{set_as} cannot be combined with the strategy {strategy!r}, which {why}: "
            "choose another, such as 'threshold'",
            set_as,
        )
    for option, is_on in combined.items():
        if is_on:
            raise OptionError(
                f"{set_as} cannot be combined with {option}: leave "
                f"{names.get(option, option)} out (or set it to what is off)",
                set_as,
            )
