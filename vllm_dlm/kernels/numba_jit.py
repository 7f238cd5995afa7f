# SPDX-License-Identifier: Apache-2.0
"""numba's compiler as all loops of this package use it: no GIL, compiled code on disk.

numba keeps compiled code beside the file that defines a function and sees changes in
that file only: functions that call each other stand in one. `numba_cache.py` keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

try:
    import numba

    from vllm_dlm.kernels.numba_cache import SafeCache
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
        compiled = numba.njit(nogil=True, **options)(function)
        # What `cache=True` sets: neither the package nor the user's cache is writable
        # where this raises.
        with contextlib.suppress(RuntimeError):
            compiled._cache = SafeCache(compiled.py_func)
        return compiled

    return decorate


def _full_width(_typing: Any) -> Any:
    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        # llvmlite's own `add` knows no attributes with values.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return numba.void(), generate


full_width: Any = None if numba is None else numba.extending.intrinsic(_full_width)
"""Called in a compiled function: LLVM makes full use of AVX-512 for the loops in it.

LLVM takes vectors of 256 bits on Intel's CPUs otherwise, as the first with AVX-512 ran
slower when they met longer ones. Without AVX-512 this changes nothing.
"""
