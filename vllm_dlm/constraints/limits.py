# SPDX-License-Identifier: Apache-2.0
"""How large a constraint may become, and how long it may take to compile."""

from __future__ import annotations

import time
from dataclasses import dataclass


class ConstraintError(ValueError):
    """A constraint that cannot be used; the message is the sentence a client reads."""


@dataclass(frozen=True)
class Limits:
    """The most that one constraint may take. A pattern that needs more is refused."""

    pattern_bytes: int = 65_536
    """Length of the pattern, in bytes of UTF-8."""
    parts: int = 200_000
    """States of the machine that is not deterministic yet."""
    subsets: int = 20_000
    """States of the machine over bytes, before those that do the same are merged."""
    states: int = 4_096
    """States of the automaton over tokens."""
    classes: int = 4_096
    """Token classes."""
    moves: int = 1 << 18
    """Pairs of a state and a class that the state takes: the cost of a position."""
    seconds: float = 10.0
    """Time to compile."""

    def check(self, what: str, count: int, most: int) -> None:
        """Refuse what is too large.

        Raises:
            ConstraintError: `count` is more than `most`.
        """
        if count > most:
            raise ConstraintError(
                f"the pattern is too large: it needs {count} {what}, and at most "
                f"{most} are taken; shorten its bounded repetitions (maxLength, "
                "maxItems, {m,n}) or leave out alternatives"
            )


class Clock:
    """How long the compilation of one pattern has taken."""

    def __init__(self, limits: Limits) -> None:
        self._seconds = limits.seconds
        self._end = time.monotonic() + limits.seconds

    def check(self) -> None:
        """Stop what takes too long.

        Raises:
            ConstraintError: the time is over.
        """
        if time.monotonic() > self._end:
            raise ConstraintError(
                f"the pattern takes more than {self._seconds:g} seconds to compile, "
                "which is the limit; shorten its bounded repetitions (maxLength, "
                "maxItems, {m,n}) or leave out alternatives"
            )


DEFAULT = Limits()
