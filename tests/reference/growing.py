# SPDX-License-Identifier: Apache-2.0
"""Canvases that grow, in plain loops: DAEDAL's first stage and rho-EOS's expansion.

Written from the papers (arXiv 2508.00819, 2601.22527) and their code; here a block's
first step alone lets a canvas grow, by whole blocks, and writes nothing then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from reference.rules import float32


@dataclass(frozen=True)
class Growing:
    """A policy; `rule` is "daedal" or "rho_eos"."""

    rule: str
    initial: int = 64
    expansion: int = 8
    threshold: float = 0.5
    window: int = 32

    def lacks(self, ends: list[bool], confidence: list[float]) -> int:
        """Positions that the canvas lacks; 0 for none.

        Args:
            ends: of each mask, from left to right: its argmax ends the text.
            confidence: of each mask.
        """
        threshold = float32(self.threshold)
        if self.rule == "daedal":
            found: list[float] = []
            for is_end, sure in reversed(list(zip(ends, confidence, strict=True))):
                if is_end and len(found) < self.window:
                    found.append(sure)
            mean = float32(math.fsum(found) / self.window)
            return self.expansion if mean < threshold else 0
        density = float32(sum(ends) / len(ends))
        if density >= threshold:
            return 0
        gap = float(threshold - density)
        return self.expansion * min(2 ** (math.ceil(gap / 0.1) - 1), 8)

    def grown(self, canvas: int, lacks: int, block_length: int, most: int) -> int:
        """The width of the wider canvas, in whole blocks, `most` at the most."""
        return min(math.ceil((canvas + lacks) / block_length) * block_length, most)
