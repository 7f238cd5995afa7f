# SPDX-License-Identifier: Apache-2.0
"""How much a request's options may hold; checked before anything reads all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dlm.messages import OptionError

LONGEST_TEXT = 1 << 20
"""Characters of an option that is text, JSON text included."""

MOST_ENTRIES = 1 << 18
"""Entries of an option's lists and objects, all levels together: a step map has one
per token, and nothing else comes near it."""

DEEPEST = 8
"""Levels of lists and objects."""


def check_size(name: str, value: Any) -> None:
    """Refuse an option that holds more than any valid one does.

    No more is looked at than it takes to find that out.

    Args:
        name: what the option is called where it was set.
        value: what a request set it to, of any type.

    Raises:
        OptionError: it is too long, or nested too deep.
    """
    entries, level = 0, [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, str) and len(each) > LONGEST_TEXT:
                raise OptionError(
                    f"{name} holds a text of {len(each)} characters; at most "
                    f"{LONGEST_TEXT} are read",
                    name,
                )
            if not isinstance(each, Mapping | list | tuple):
                continue
            entries += len(each)
            if entries > MOST_ENTRIES:
                raise OptionError(
                    f"{name} has more than {MOST_ENTRIES} entries, which no option "
                    "needs",
                    name,
                )
            if isinstance(each, Mapping):
                below.extend(each.keys())
                below.extend(each.values())
            else:
                below.extend(each)
        if not below:
            return
        level = below
    raise OptionError(
        f"{name} is nested deeper than {DEEPEST} levels, which no option needs", name
    )
