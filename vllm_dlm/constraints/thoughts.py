# SPDX-License-Identifier: Apache-2.0
"""A pattern behind a thought: any text, the token that ends thoughts, then a match.

Reasoning parsers tell a thought from the answer behind it by one token. So this is one
automaton over tokens again, and a canvas can be written in any order under it: where
that token comes is left to the model, as long as a match still fits behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vllm_dlm.constraints.automaton import UNBOUNDED, Automaton, compile_pattern
from vllm_dlm.constraints.limits import DEFAULT, ConstraintError, Limits
from vllm_dlm.constraints.structural import without
from vllm_dlm.constraints.syntax import write
from vllm_dlm.constraints.vocabulary import Vocabulary


class ThoughtEnd(NamedTuple):
    """What ends a thought."""

    token: int
    text: str
    """How the token reads. No other tokens may spell it in the thought: a parser that
    looks at the text would end the thought there."""


def compile_answer(
    pattern: str,
    thought: ThoughtEnd | None,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    barred: Sequence[int] = (),
    limits: Limits = DEFAULT,
) -> Automaton:
    """Compile what a whole answer has to match.

    Args:
        pattern: of the answer, or of what is behind its thought.
        thought: what ends the thought that it begins with; None if it has none.
        vocabulary, end_ids, barred, limits: as in `compile_pattern`.

    Raises:
        ConstraintError: as `compile_pattern`; or the thought's end is barred.
    """
    answer = compile_pattern(pattern, vocabulary, end_ids, barred, limits)
    if thought is None:
        return answer
    if thought.token in {*barred, *end_ids}:
        raise ConstraintError(
            f"the token {thought.text!r} ends the thought in front of the answer, and "
            "may not be forbidden, nor end the text"
        )
    text = _thought_text(
        *(thought.text, vocabulary, tuple(end_ids), tuple(barred), limits)
    )
    return _joined(text, thought.token, answer, limits)


@lru_cache(maxsize=8)
def _thought_text(
    end: str,
    vocabulary: Vocabulary,
    end_ids: tuple[int, ...],
    barred: tuple[int, ...],
    limits: Limits,
) -> Automaton:
    """Any text in which the end of a thought is not spelt: the same for all patterns.

    Args:
        end: how the end reads.
        vocabulary, end_ids, barred, limits: as in `compile_pattern`.
    """
    free = write(without([end]))
    return compile_pattern(free, vocabulary, end_ids, barred, limits)


def _joined(
    text: Automaton, token: int, answer: Automaton, limits: Limits
) -> Automaton:
    """Both, one behind the other, with a token between them.

    Args:
        text: its end state is left out: the end tokens come behind the answer.
        token: leads from where `text` matches to where `answer` begins.
    """
    states = text.end_state
    limits.check("states", states + len(answer.accepting), limits.states)
    kinds = np.stack([text.class_of, answer.class_of])
    # The token is a class of its own, also where other tokens do the same in `answer`.
    kinds[0, token] = -2
    pairs, number = np.unique(kinds, axis=1, return_inverse=True)
    class_of = number.reshape(-1).astype(np.int32)
    limits.check("token classes", pairs.shape[1], limits.classes)
    transitions = np.full(
        (states + len(answer.accepting), pairs.shape[1]), -1, dtype=np.int32
    )
    for column, (own, behind) in enumerate(pairs.T.tolist()):
        if own == -2:
            matches = text.accepting[:states]
            transitions[:states, column][matches] = states + answer.start
        elif own >= 0 and own != text.end_class:
            transitions[:states, column] = text.transitions[:states, own]
        if behind >= 0:
            to = answer.transitions[:, behind]
            transitions[states:, column] = np.where(to < 0, -1, to + states)
    limits.check("moves", int((transitions >= 0).sum()), limits.moves)
    # Without what no state takes; the end is the last class, as everywhere.
    is_end = pairs[1] == answer.end_class
    used = np.flatnonzero((transitions >= 0).any(axis=0) & ~is_end)
    used = np.append(used, np.flatnonzero(is_end))
    renamed = np.full(pairs.shape[1], -1, np.int32)
    renamed[used] = np.arange(len(used))
    shortest = 1 + answer.min_length[answer.start]
    longest = np.minimum(
        text.max_length[:states].astype(np.int64)
        + 1
        + int(answer.max_length[answer.start]),
        UNBOUNDED,
    )
    joined = Automaton(
        class_of=renamed[class_of],
        transitions=np.ascontiguousarray(transitions[:, used]),
        accepting=np.append(np.zeros(states, np.bool_), answer.accepting),
        min_length=np.append(text.min_length[:states] + shortest, answer.min_length),
        max_length=np.append(longest, answer.max_length).astype(np.int32),
        end_state=states + answer.end_state,
        end_class=len(used) - 1,
        start=text.start,
    )
    for array in vars(joined).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return joined
