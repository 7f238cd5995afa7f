# SPDX-License-Identifier: Apache-2.0
"""How the blocks of sdar-tiny grow while it is trained."""

from __future__ import annotations

BLOCK_LENGTH = 8
# Block length -> share of the steps at which its stage ends.
STAGES = {2: 2 / 15, 4: 1 / 3, BLOCK_LENGTH: 1.0}


def block_length_at(step: int, total_steps: int) -> int:
    """Tokens per block in a step of so many."""
    return next(
        length for length, end in STAGES.items() if step < round(end * total_steps)
    )


def stage_steps(total_steps: int) -> dict[int, int]:
    """Tokens per block of each stage of so many steps -> its steps."""
    ends = {length: round(end * total_steps) for length, end in STAGES.items()}
    begins = [0, *ends.values()]
    return {
        length: end - begin
        for (length, end), begin in zip(ends.items(), begins, strict=False)
    }
