# SPDX-License-Identifier: Apache-2.0
"""Which cases of a parametrized test run by default, and which in the slow tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def fast(*chosen: Any, of: Iterable[Any]) -> list[Any]:
    """All cases, those that are not chosen marked slow.

    Args:
        chosen: cases that run by default: one for each mechanism.
        of: all cases, in their order; a tuple holds a case's several arguments.

    Raises:
        ValueError: a chosen case is none of them.
    """
    cases = list(of)
    if unknown := [one for one in chosen if one not in cases]:
        raise ValueError(f"{unknown} are none of the cases: {cases}")
    return [
        one
        if one in chosen
        else pytest.param(
            *(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.slow
        )
        for one in cases
    ]
