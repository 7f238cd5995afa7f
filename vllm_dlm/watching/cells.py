# SPDX-License-Identifier: Apache-2.0
"""A canvas as frames leave it, and how a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.text import Text

MASK = "\N{MEDIUM SHADE}"

COLOURS = ("step", "confidence")
"""What the colour of a token may stand for."""

RAMP = {
    "step": ("yellow", "bright_green", "green", "cyan", "bright_blue", "magenta"),
    "confidence": ("bright_red", "yellow", "bright_green", "green"),
}
"""Of either, from early to late and from unsure to sure: a terminal's own colours,
which its user has chosen to be readable."""

CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
del CONTROLS[ord("\n")], CONTROLS[ord("\t")]


def harmless(text: str) -> str:
    """A text without what a terminal would obey."""
    return text.translate(CONTROLS)


@dataclass
class Cell:
    """One position."""

    text: str | None = None
    """Of its token; None for a mask."""
    confidence: float | None = None
    step: int = 0
    was: int | None = None
    """The last token that was there."""
    edited: bool = False
    """It has replaced another token."""


@dataclass(frozen=True)
class Written:
    """A position that a frame says has changed."""

    position: int
    token: int | None
    text: str | None
    confidence: float | None
    step: int


@dataclass
class Cells:
    """One canvas, up to the end of its active block."""

    cells: list[Cell] = field(default_factory=list)
    forwards: int = 0
    """Steps so far."""
    new: set[int] = field(default_factory=set)
    """Positions that the last frame has changed."""

    def apply(
        self, writes: Iterable[Written], *, end: int, canvas_end: int, forward: int
    ) -> None:
        """Take over a frame.

        Args:
            end: one past the active block's last position.
            canvas_end: one past the canvas's last position.
            forward: number of the frame's step in the request.
        """
        self.forwards = max(self.forwards, forward + 1)
        self.new = set()
        self._reach(end)
        for write in writes:
            self._reach(write.position + 1)
            cell = self.cells[write.position]
            if write.token is not None:
                cell.edited |= cell.was not in (None, write.token)
                cell.was = write.token
            cell.text = None if write.token is None else f"#{write.token} "
            if cell.text is not None and write.text is not None:
                cell.text = harmless(write.text)
            cell.confidence, cell.step = write.confidence, write.step
            self.new.add(write.position)
        del self.cells[canvas_end:]

    def _reach(self, end: int) -> None:
        while len(self.cells) < end:
            self.cells.append(Cell())

    @property
    def written(self) -> int:
        """Positions that are no masks."""
        return sum(cell.text is not None for cell in self.cells)

    def as_text(self, colour: str) -> Text:
        """The canvas in colours.

        Args:
            colour: one of `COLOURS`.
        """
        shown, ramp = Text(), RAMP[colour]
        for position, cell in enumerate(self.cells):
            if cell.text is None:
                shown.append(MASK, "dim")
                continue
            part = cell.step / max(self.forwards - 1, 1)
            if colour == "confidence":
                part = 1.0 if cell.confidence is None else cell.confidence
            style = ramp[min(int(part * len(ramp)), len(ramp) - 1)]
            if cell.edited:
                style += " underline"
            if position in self.new:
                style += " reverse"
            shown.append(cell.text, style)
        return shown

    def facts(self, seconds: float) -> str:
        """Forwards, seconds, tokens: a line."""
        rate = self.written / self.forwards if self.forwards else 0.0
        return (
            f"{self.forwards} forwards, {seconds:.1f} s, {self.written} tokens, "
            f"{rate:.1f} tokens per forward"
        )

    def shown(self, console: Console, colour: str, seconds: float) -> RenderableType:
        """The canvas and its facts, as much as the terminal has lines for."""
        text = self.as_text(colour)
        lines = text.wrap(console, console.width)
        room = max(console.height - 3, 1)
        return Group(*lines[-room:], Text(self.facts(seconds), "dim"))
