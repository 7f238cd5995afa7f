# SPDX-License-Identifier: Apache-2.0
"""Report: what `check_strategy` has found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What was checked, in the order in which it was; `print` shows it."""

    strategy: str
    """Its name."""
    params: str
    """Its parameters."""
    block_length: int
    views: int
    """Views that it decided."""
    rows: int
    """Requests in each."""
    findings: dict[str, str] = field(default_factory=dict)
    """What was checked -> what was found."""
    traces: bool | None = None
    """Whether one compiled function serves any number of requests; None if that was
    not tried. A strategy that does not trace is served all the same: eagerly."""

    def __str__(self) -> str:
        title = (
            f"{self.strategy} ({self.params}), blocks of {self.block_length}: "
            f"{self.views} steps of {self.rows} requests"
        )
        width = max(map(len, self.findings), default=0)
        lines = [f"  {name:{width}}  {text}" for name, text in self.findings.items()]
        return "\n".join([title, *lines])
