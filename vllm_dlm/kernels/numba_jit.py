# SPDX-License-Identifier: Apache-2.0
"""numba's compiler as all loops of this package use it: no GIL, compiled code on disk.

numba keeps compiled code beside the file that defines a function and sees changes in
that file only: functions that call each other stand in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba
except ImportError:  # the extra "cpu" is not installed
    numba = None

F = TypeVar("F", bound=Callable[..., Any])

AVAILABLE = numba is not None
"""Whether functions are compiled; without numba they stay as they are."""


def jit(**options: Any) -> Callable[[F], F]:
    """A decorator that compiles a function, with further options of `numba.njit`."""

    def decorate(function: F) -> F:
        if numba is None:
            return function
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither the package nor the user's cache is writable
            return numba.njit(nogil=True, **options)(function)

    return decorate
