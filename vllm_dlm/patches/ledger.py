# SPDX-License-Identifier: Apache-2.0
"""The ledger: what an entry says, and the code that puts it in force.

An entry stands directly above the function that makes the replacement, as a decorator:

    @patch("module:Class.method", why=..., upstream=..., drop_when=...)
    def method(original):
        '''How the replacement differs from the original.'''
        ...
        return replacement

`themes.py` lists the files that hold entries. Nothing of vLLM is imported before an
entry is applied: plugins are loaded while vLLM is half imported itself.

Not wrapped, but given a subclass of ours, because vLLM builds them and offers no hook:
each `vllm.v1.request:Request` (how a waiting request counts its tokens) and its
`vllm.v1.core.kv_cache_manager:KVCacheManager` (which pages may be shared), by
`DiffusionStepScheduler`. What is set on single objects of an engine goes through
`vllm_objects.replace`.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vllm_dlm.vllm_objects import missing

_MARK = "_vllm_dlm_patches"

Make = Callable[[Any], Callable[..., Any]]
"""From the plain function behind a symbol to its replacement."""


class Where(Enum):
    """In which processes an entry is applied."""

    EVERYWHERE = "wherever the plugin is loaded"
    SERVER = "where the module is loaded already, as in an HTTP server"
    ADMISSION = "where an engine's configuration is made, as its front end does"
    FRONT_END = "there, if the model is one of ours"
    CPU = "where vLLM runs on our CPU platform"
    CPU_KERNELS = "on that platform, if there is no Triton"
    CPU_WORKER = "in workers there"
    MODEL = "where vLLM loads the model that the entry is about"


@dataclass(frozen=True)
class Patch:
    """One wrapped vLLM symbol."""

    symbol: str
    """`module:Class.attribute` or `module:attribute`."""
    why: str
    upstream: str
    """Page and anchor of the text for vLLM: the fault, or the seam that is missing."""
    drop_when: str
    make: Make
    where: Where = Where.EVERYWHERE
    mends_vllm: bool = False
    """A fault of vLLM's that other models meet as well. Such an entry goes when vLLM is
    mended, and is not among the 18 symbols that we allow ourselves to wrap."""
    adds: bool = False
    """vLLM has nothing by that name, and `make` ignores its argument, None."""
    overrides: tuple[str, ...] = ()
    """Methods of vLLM's classes that this entry replaces on objects, not on classes."""

    @property
    def how(self) -> str:
        """What the replacement does: the docstring of the function that makes it."""
        return " ".join(inspect.cleandoc(self.make.__doc__ or "").split())


PATCHES: dict[str, Patch] = {}
"""Symbol -> entry, of the themes that are imported; `themes.every_patch` has all."""

_applied: list[Patch] = []


def patch(symbol: str, **said: Any) -> Callable[[Make], Make]:
    """Enter a function into the ledger as the one that replaces `symbol`.

    Args:
        symbol: `module:Class.attribute` or `module:attribute`.
        **said: the other fields of `Patch`.

    Raises:
        ValueError: the symbol has an entry already.
    """

    def enter(make: Make) -> Make:
        if symbol in PATCHES:
            raise ValueError(f"{symbol!r} is in the patch ledger already")
        PATCHES[symbol] = Patch(symbol, make=make, **said)
        return make

    return enter


def entries(theme: str, *places: Where) -> list[Patch]:
    """The entries of a module that are applied in one of `places`, in its order."""
    return [
        entry
        for entry in PATCHES.values()
        if entry.make.__module__ == theme and entry.where in places
    ]


def apply(found: Iterable[Patch]) -> None:
    """Put entries in force; those of `Where.SERVER` only if their module is loaded.

    Raises:
        RuntimeError: this vLLM has no such symbol.
    """
    for entry in found:
        module = entry.symbol.partition(":")[0]
        if entry.where is not Where.SERVER or module in sys.modules:
            (add if entry.adds else wrap)(entry.symbol)


def applied() -> list[Patch]:
    """The entries in force in this process, in the order they were applied."""
    return list(_applied)


def wrap(symbol: str) -> None:
    """Replace `symbol` by what its entry makes of it, once per process.

    Functions, methods, class and static methods and properties keep their kind.

    Raises:
        ValueError: no such entry in the ledger.
        RuntimeError: this vLLM has no such symbol.
    """
    entry = _entry(symbol)
    owner, attribute, raw = find(symbol)
    original = raw
    if isinstance(raw, property):
        original = raw.fget
    elif isinstance(raw, (classmethod, staticmethod)):
        original = raw.__func__
    marks: frozenset[str] = getattr(original, _MARK, frozenset())
    if symbol in marks:
        return
    replacement: Any = functools.wraps(original)(entry.make(original))
    setattr(replacement, _MARK, marks | {symbol})
    if isinstance(raw, property):
        replacement = raw.getter(replacement)
    elif isinstance(raw, (classmethod, staticmethod)):
        replacement = type(raw)(replacement)
    setattr(owner, attribute, replacement)
    _applied.append(entry)


def add(symbol: str) -> None:
    """Set `symbol` to what its entry makes, where vLLM has nothing by that name.

    Raises:
        ValueError: no such entry in the ledger.
        RuntimeError: this vLLM has no such module or class.
    """
    entry = _entry(symbol)
    owner, attribute = _owner(symbol)
    if not hasattr(owner, attribute):
        setattr(owner, attribute, entry.make(None))
        _applied.append(entry)


def find(symbol: str) -> tuple[Any, str, Any]:
    """The owner of a symbol, its name there, and what it is there.

    Raises:
        RuntimeError: this vLLM has no such symbol.
    """
    owner, attribute = _owner(symbol)
    raw = inspect.getattr_static(owner, attribute, None)
    if raw is None:
        raise RuntimeError(missing(symbol))
    return owner, attribute, raw


def _entry(symbol: str) -> Patch:
    if symbol not in PATCHES:
        raise ValueError(
            f"{symbol!r} is not in the patch ledger; it has: {', '.join(PATCHES)}"
        )
    return PATCHES[symbol]


def _owner(symbol: str) -> tuple[Any, str]:
    module, _, path = symbol.partition(":")
    parent, _, attribute = path.rpartition(".")
    try:
        return pkgutil.resolve_name(f"{module}:{parent}"), attribute
    except (ImportError, AttributeError) as error:
        raise RuntimeError(missing(symbol)) from error
