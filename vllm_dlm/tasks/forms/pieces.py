# SPDX-License-Identifier: Apache-2.0
"""A problem of llada-forms: the turns of a chat, and the pieces of a canvas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_dlm.tasks.forms import tools

SYSTEM = (
    "You are a helpful assistant.",
    "You are helpful.",
    "You fill forms.",
)
"""What stands in front of some chats."""


@dataclass(frozen=True)
class Piece:
    """A part of a canvas: text that is given, or the right text of a hole."""

    text: str
    is_hole: bool


@dataclass(frozen=True)
class Turn:
    """A message of the chat before the answer."""

    role: str
    text: str


@dataclass(frozen=True)
class Problem:
    """A prompt, a canvas, and what makes an answer right.

    Args:
        kind: A key of `problems.KINDS`.
        turns: The chat; a plain prompt is the text of one turn without a role.
        pieces: The canvas.
        open_end: The last hole goes on to the end of the canvas, and the text ends in
            it with <|endoftext|>; else the canvas ends with the last piece.
        exact: Holes are as wide as what they need; else they may be wider.
        tools: The tools that the request offers.
        schema: JSON schema of the answer, where it is JSON.
    """

    kind: str
    turns: tuple[Turn, ...]
    pieces: tuple[Piece, ...]
    open_end: bool = True
    exact: bool = True
    tools: tuple[tools.Tool, ...] = ()
    schema: dict[str, Any] | None = None

    @property
    def answer(self) -> str:
        """The canvas with its holes filled right."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def question(self) -> str:
        """The last thing that the user says."""
        return self.turns[-1].text

    @property
    def is_chat(self) -> bool:
        return bool(self.turns[0].role)


def free(text: str) -> tuple[Piece, ...]:
    """The canvas of a free answer."""
    return (Piece(text, True),)
