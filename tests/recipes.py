# SPDX-License-Identifier: Apache-2.0
"""The tables of memory on the pages of docs/recipes, read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGES = Path(__file__).parent.parent / "docs/recipes"

COLUMNS = ((24, 1), (80, 1), (141, 1), (80, 4))
"""Gigabytes of a GPU and number of GPUs, in the tables' order."""


@dataclass(frozen=True)
class Row:
    """Models of one size."""

    names: tuple[str, ...]
    weights: str
    kv_per_token: str
    fitting: tuple[str, ...]
    """Requests at most, in the order of `COLUMNS`."""
    source: str


def rows(page: Path) -> list[Row]:
    """The rows of a page's table; `-b8` behind `sdar-4b` is `sdar-4b-b8`."""
    found = []
    for line in page.read_text("utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        names: list[str] = []
        for name in first.replace("`", "").split(", "):
            names.append(f"{names[0]}{name}" if name.startswith("-") else name)
        weights, per_token, *fitting, source = cells
        found.append(Row(tuple(names), weights, per_token, tuple(fitting), source))
    return found
