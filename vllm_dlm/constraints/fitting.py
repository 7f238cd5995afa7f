# SPDX-License-Identifier: Apache-2.0
"""Whether a text with holes can be completed to one that an automaton accepts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_dlm.constraints.automaton import Automaton

HOLE = -1
"""In place of a token: the position is open."""


def first_misfit(
    automaton: Automaton, tokens: Sequence[int], ends_from: int
) -> int | None:
    """The first position at which no text is left that matches.

    Args:
        automaton: of the whole text, which has to match where it ends.
        tokens: ids from the left, or `HOLE`. The text fills all positions, with end
            tokens at its end.
        ends_from: the first position that an end token may fill.

    Returns:
        A position; the number of positions where all of them fit, but no text ends
        there; None where a text fits.
    """
    words = automaton.transitions[:, : automaton.end_class]
    states: NDArray[np.bool_] = np.zeros(len(automaton.transitions), np.bool_)
    states[automaton.start] = True
    for i, token in enumerate(tokens):
        if token == HOLE:
            moves = words if i < ends_from else automaton.transitions
            targets = moves[states]
        elif (kind := automaton.class_of[token]) >= 0:
            targets = automaton.transitions[states, kind]
        else:
            return i
        states = np.zeros_like(states)
        states[targets[targets >= 0]] = True
        if not states.any():
            return i
    return None if (states & automaton.accepting).any() else len(tokens)
