# SPDX-License-Identifier: Apache-2.0
"""One small typed registry: names to lazily imported classes.

A literal table (`name -> "module:Class"`) keeps listing names free of imports;
entry points let a third party add names without touching this repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from vllm_dlm.messages import quote

T = TypeVar("T")


def load(target: str) -> Any:
    """What is behind `module:name`, imported now."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


class Registry(Generic[T]):
    """Lazily imported objects by name.

    Args:
        kind: what is registered, in words, for error messages ("decoding strategy").
        table: name -> "module:attribute".
        group: entry-point group that third parties add to, if any.
    """

    def __init__(
        self, kind: str, table: Mapping[str, str], group: str | None = None
    ) -> None:
        self.kind = kind
        self._targets = dict(table)
        self.group = group
        self._loaded: dict[str, T] = {}
        self._scanned = False

    def _scan_entry_points(self) -> None:
        if self._scanned or self.group is None:
            return
        self._scanned = True
        for entry in entry_points(group=self.group):
            # A third party adds names; it does not silently replace ours.
            self._targets.setdefault(entry.name, entry.value)

    def names(self) -> list[str]:
        """All known names, sorted; imports none of them."""
        self._scan_entry_points()
        return sorted(self._targets)

    def register(self, name: str, value: T) -> None:
        """Add an object under a new name.

        Raises:
            ValueError: the name is taken.
        """
        if name in self.names():
            raise ValueError(f"the {self.kind} {name!r} is registered already")
        self._targets[name] = f"{value.__module__}:{getattr(value, '__name__', name)}"
        self._loaded[name] = value

    def check(self, name: Any) -> str:
        """Return `name` if it is known.

        Raises:
            ValueError: it is not; the message lists the names that are.
        """
        if not isinstance(name, str) or name not in self.names():
            raise ValueError(
                f"unknown {self.kind} {quote(name)}; choose one of: {', '.join(self)}"
            )
        return name

    def __getitem__(self, name: str) -> T:
        if name not in self._loaded:
            self._loaded[name] = load(self._targets[self.check(name)])
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()
