# SPDX-License-Identifier: Apache-2.0
"""How many steps a block takes whose tokens are rewritten."""

from __future__ import annotations

MOST_POST_STEPS = 64
"""Edits that go back and forth would go on for as long as a request may ask."""


def most_steps(block_length: int, post_steps: int = MOST_POST_STEPS) -> int:
    """Steps of a block at most.

    One for each mask, and as many again, because an edit may mask a token anew (that of
    `levenshtein`, and any with `reference_exact`). One more, because what the engine
    lets a block's very last step do is no edit.

    Args:
        post_steps: forwards that it may take for edits only.
    """
    return 2 * block_length + post_steps + 1
