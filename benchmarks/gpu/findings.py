# SPDX-License-Identifier: Apache-2.0
"""What a part of the check found, as it comes to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """There is nothing to do here; the text says why."""


@dataclass
class Findings:
    """What a part has found: rows of the table, and numbers for the JSON file."""

    file: Path
    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    problem: str | None = None
    """What is wrong, where the part itself came to its end."""

    def add(self, what: str, value: str, **numbers: Any) -> None:
        """Keep a row of the table and what stands behind it."""
        self.rows.append((what, value))
        self.numbers |= numbers
        self.write()

    def write(self) -> None:
        """Write the file anew."""
        found = {name: value for name, value in vars(self).items() if name != "file"}
        self.file.write_text(json.dumps(found), encoding="utf-8")


def has_cuda() -> bool:
    """Whether there is a GPU that CUDA serves."""
    import torch

    return torch.cuda.is_available()
