# SPDX-License-Identifier: Apache-2.0
"""A pattern as an automaton over the tokens of a vocabulary.

Tokens that do the same in every state are one class: a schema needs a few hundred of
these, whatever the vocabulary. Behind a match comes an end token, and behind that only
end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dlm.constraints import loops
from vllm_dlm.constraints.byte_machine import ByteMachine, byte_machine
from vllm_dlm.constraints.limits import DEFAULT, Clock, Limits
from vllm_dlm.constraints.limits import ConstraintError as ConstraintError
from vllm_dlm.constraints.syntax import parse
from vllm_dlm.constraints.vocabulary import Vocabulary

UNBOUNDED = 1 << 30
"""`Automaton.max_length` of a state from which texts of any length match."""

_TOKENS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Automaton:
    """What may be written, token by token. The arrays are read-only.

    Shapes: V ids of the model, S states, K classes. From every state a match can be
    completed.
    """

    class_of: NDArray[np.int32]
    """[V], the class of each token; -1 for a token that no state takes."""
    transitions: NDArray[np.int32]
    """[S, K], the state behind a token of a class; -1 where it may not stand."""
    accepting: NDArray[np.bool_]
    """[S], whether the text matches here. The end state does too."""
    min_length: NDArray[np.int32]
    """[S], fewest tokens to a match, end tokens not counted; 0 where it is one."""
    max_length: NDArray[np.int32]
    """[S], most tokens of text from here, end tokens not counted; `UNBOUNDED` where
    there is no limit."""
    end_state: int
    """The state behind the text's end. The end class leads from accepting states
    there, and from there only to itself."""
    end_class: int
    """The class of the end tokens."""
    start: int = 0

    @property
    def num_bytes(self) -> int:
        """Memory, in bytes."""
        arrays = (self.class_of, self.transitions, self.accepting)
        return sum(each.nbytes for each in (*arrays, self.min_length, self.max_length))


def compile_pattern(
    pattern: str,
    vocabulary: Vocabulary,
    end_ids: Sequence[int],
    barred: Sequence[int] = (),
    limits: Limits = DEFAULT,
) -> Automaton:
    """Compile a regular expression that the whole text has to match.

    Args:
        pattern: see `syntax.py`.
        vocabulary: of the model's tokenizer.
        end_ids: ids of which each ends a text; at least one that is not barred.
        barred: ids that may not be written, whatever they read.
        limits: on the size of the automaton, and on the time.

    Raises:
        ConstraintError: the pattern is no regular expression, too large, or no text of
            this vocabulary matches it.
    """
    clock = Clock(limits)
    size = len(pattern.encode("utf-8", "surrogatepass"))
    limits.check("bytes of text", size, limits.pattern_bytes)
    machine = byte_machine(parse(pattern), limits, clock)
    limits.check("states", len(machine.moves) + 1, limits.states)
    ends = sorted({token for token in end_ids if 0 <= token < vocabulary.size})
    ends = [token for token in ends if token not in set(barred)]
    if not ends:
        raise ConstraintError(
            "no token may end the text: the model declares none, or all of them are "
            "forbidden; set stop_token_ids"
        )
    class_of, columns = _classes(machine, vocabulary, [*ends, *barred], limits, clock)
    return _closed(machine.accepting, class_of, columns, ends, limits)


def _classes(
    machine: ByteMachine,
    vocabulary: Vocabulary,
    without: Sequence[int],
    limits: Limits,
    clock: Clock,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens that lead from each state to the same state are one class.

    Returns:
        class_of: [V], -1 for a token that no state takes, and those of `without`.
        columns: [classes, states], the state that each state is led to, or -1.
    """
    count = len(vocabulary.ids)
    hashes = np.zeros(count, np.uint64)
    for first in range(0, count, _TOKENS_AT_ONCE):
        clock.check()
        last = min(first + _TOKENS_AT_ONCE, count)
        loops.walk(
            *(machine.moves, vocabulary.data, vocabulary.offsets, vocabulary.shared),
            *(first, last, hashes),
        )
    hashes[np.isin(vocabulary.ids, np.array(without, np.int64))] = 0
    taken = np.flatnonzero(hashes)
    _, example, number = np.unique(
        hashes[taken], return_index=True, return_inverse=True
    )
    limits.check("token classes", len(example), limits.classes)
    class_of = np.full(vocabulary.size, -1, np.int32)
    class_of[vocabulary.ids[taken]] = number.reshape(-1)
    table = np.vstack([machine.moves, np.full((1, 256), -1, np.int32)])
    columns = np.empty((len(example), len(machine.moves)), np.int32)
    for each, token in enumerate(taken[example]):
        states = np.arange(len(machine.moves))
        for byte in vocabulary.data[slice(*vocabulary.offsets[token : token + 2])]:
            # -1 is the last row, which is dead.
            states = table[states, byte]
        columns[each] = states
    return class_of, columns


def _closed(
    accepting: NDArray[np.bool_],
    class_of: NDArray[np.int32],
    columns: NDArray[np.int32],
    ends: Sequence[int],
    limits: Limits,
) -> Automaton:
    """Add the end, and leave out states that no text goes through, or ends behind.

    Args:
        accepting: [states].
        class_of: [V], without end tokens.
        columns: [classes, states].
        ends: ids of end tokens.
    """
    moves = np.ascontiguousarray(columns.T)
    states, kinds = moves.shape
    lengths = loops.fewest(moves, accepting)
    if lengths[0] < 0:
        raise ConstraintError(
            "the model's tokenizer cannot write any text that matches the pattern"
        )
    reached = loops.reachable(moves, lengths >= 0)
    kept = np.flatnonzero(reached)
    new = np.full(states + 1, -1, np.int32)
    new[kept] = np.arange(len(kept))
    # -1 is the last entry of `new`.
    moves = new[moves[kept]]
    used = np.flatnonzero((moves >= 0).any(axis=0))
    # States that are gone may have been all that told two classes apart.
    distinct, number = np.unique(moves[:, used], axis=1, return_inverse=True)
    renamed = np.full(kinds + 1, -1, np.int32)
    renamed[used] = number.reshape(-1)
    class_of = renamed[class_of]
    end_state, end_class = len(kept), distinct.shape[1]
    limits.check("states", end_state + 1, limits.states)
    transitions = np.full((end_state + 1, end_class + 1), -1, np.int32)
    transitions[:end_state, :end_class] = distinct
    transitions[:end_state, end_class][accepting[kept]] = end_state
    transitions[end_state, end_class] = end_state
    limits.check("moves", int((transitions >= 0).sum()), limits.moves)
    class_of[list(ends)] = end_class
    longest = loops.most(np.ascontiguousarray(transitions[:end_state, :end_class]))
    automaton = Automaton(
        class_of=class_of,
        transitions=transitions,
        accepting=np.append(accepting[kept], True),
        min_length=np.append(lengths[kept], 0).astype(np.int32),
        max_length=np.append(np.where(longest < 0, UNBOUNDED, longest), 0).astype(
            np.int32
        ),
        end_state=end_state,
        end_class=end_class,
    )
    for array in vars(automaton).values():
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return automaton
