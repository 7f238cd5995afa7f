# SPDX-License-Identifier: Apache-2.0
"""Recordings that a client sends, to be replayed: what is accepted as one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vllm_dlm.option_types import Count
from vllm_dlm.strategies.base import Context
from vllm_dlm.strategies.post_steps import most_steps

Step = Annotated[Count, Field(ge=-1, le=1_000_000)]
Token = Annotated[Count, Field(ge=0)]

LONGEST_MAP = 131_072
"""Tokens; it is sent with the request and kept on the device."""


def check_length(entries: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The entries, one for each output token.

    Raises:
        ValueError: there are none, or too many.
    """
    if entries is not None and not 1 <= len(entries) <= LONGEST_MAP:
        raise ValueError(
            f"a step map has 1 to {LONGEST_MAP} entries, one per output token; "
            f"this one has {len(entries)}"
        )
    return entries


def check_recording(
    steps: tuple[int, ...],
    tokens: tuple[int, ...] | None,
    block_length: int,
    context: Context,
) -> None:
    """Refuse steps that no recording has, and tokens that are none.

    Args:
        steps: of each output token, -1 for none.
        tokens: their ids; None for the model's own.

    Raises:
        ValueError: it says what is wrong with the first.
    """
    for token in tokens or ():
        if context.vocab_size is not None and token >= context.vocab_size:
            raise ValueError(
                f"recorded_tokens: {token} is no token of this model, whose ids go "
                f"from 0 to {context.vocab_size - 1}"
            )
        if token == context.mask_id:
            raise ValueError(
                f"recorded_tokens: {token} is the mask, which is never written; "
                "end the list before it, or name a token"
            )
    # What is beyond the request's positions is never waited for.
    reached = steps[: context.positions]
    # One more than they fill: the prompt's last tokens may share the first.
    blocks = -(-len(reached) // block_length) + 1
    # More would be a request that only waits.
    limit = blocks * most_steps(block_length)
    if max(reached) >= limit:
        raise ValueError(
            f"recorded_steps: step {max(reached)} is more than a recording of "
            f"{len(reached)} positions in blocks of {block_length} has; at most "
            f"{limit - 1} is accepted"
        )
