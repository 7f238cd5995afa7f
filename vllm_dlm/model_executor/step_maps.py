# SPDX-License-Identifier: Apache-2.0
"""Step maps inside the engine: when each token of a request was written.

The worker keeps the step of its block at which a position was last written. The
numbers travel as two columns behind the token ids of vLLM's log-probabilities, which
is the one thing that a reply holds per token. The scheduler takes them off again,
counts the steps of the blocks before, and puts a request's rows `[step, logprob,
edited]` into `EngineCoreOutput.routed_experts`: the only array per token that vLLM
carries to each output of a request, cut where its text is cut. (Which experts were
chosen is not returned for our models.) The last rows go on to the end of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.outputs import LogprobsLists

COLUMNS = 2
"""Behind the token ids of a reply's log-probabilities: step, edited."""
NEVER = -1
"""Step of a mask that no step replaced (`reference_exact` may end so)."""


NOT_WRITTEN = (NEVER, 0)
"""The columns of a position that no step has written."""


def note_writes(
    step_maps: torch.Tensor,
    seats: torch.Tensor,
    positions: torch.Tensor,
    steps: torch.Tensor,
) -> None:
    """Note that steps wrote these positions, for some of them not the first time.

    Args:
        step_maps: [seats, max_model_len, COLUMNS] int32, changed in place.
        seats, positions, steps: [N] int64; a step counts in its block.
    """
    rewritten = step_maps[seats, positions, 0] != NEVER
    step_maps[seats, positions] = torch.stack([steps, rewritten], dim=1).int()


@dataclass
class StepCount:
    """Denoise steps of one request, by block: a step of a block is which of its own."""

    before: int = 0
    """Steps of all finished blocks."""
    in_block: int = 0
    """Forwards so far of the block that began at `block`: a step each, but for"""
    joined: int = 0
    """steps that shared a forward with an earlier one (`Decision.step_ahead`), as far
    as a step map needs them."""
    block: int = -1

    def enter(self, block: int) -> None:
        """The active block begins at this position; what it is not is finished."""
        if block != self.block:
            self.before += self.in_block + self.joined
            self.in_block, self.joined, self.block = 0, 0, block

    def note_rows(self, rows: np.ndarray) -> None:
        """Count what a step map says of the block, as `request_rows` gives it.

        What was written last is among these rows: until then a mask was before it.
        """
        written = rows[:, 0][rows[:, 0] != NEVER]
        if len(written):
            joined = int(written.max()) + 1 - self.before - self.in_block
            # Below 0 where a map says since when tokens have been what they are.
            self.joined = max(joined, 0)


def take_columns(
    logprobs: LogprobsLists | None,
) -> tuple[LogprobsLists | None, np.ndarray | None]:
    """The log-probabilities as vLLM knows them, and the columns behind the token ids.

    Returns:
        The columns are [tokens, COLUMNS] int32, None where no request asked.
    """
    if logprobs is None:
        return None, None
    ids = logprobs.logprob_token_ids
    if ids.shape[1] == logprobs.logprobs.shape[1]:
        return logprobs, None
    return (
        logprobs._replace(logprob_token_ids=ids[:, :-COLUMNS]),
        ids[:, -COLUMNS:],
    )


def up_to_the_end(rows: np.ndarray, num_tokens: int) -> np.ndarray:
    """A finished text's rows, without what steps after its last one have written.

    A forward that does several steps (`Decision.step_ahead`) may do some of those, or
    may not: that depends on how many drafts it evaluates.

    Args:
        rows: [rest of the block, 3] as of `request_rows`.
        num_tokens: how many of them are the text's; the last step wrote one of these.
    """
    rows = rows.copy()
    behind = rows[num_tokens:, 0]
    behind[behind > rows[:num_tokens, 0].max(initial=NEVER)] = NEVER
    return rows


def request_rows(
    columns: np.ndarray, logprobs: LogprobsLists, row: int, before: int
) -> np.ndarray:
    """[rest of the block, 3] float64: step of the request, log-probability, edited.

    Args:
        columns: as `take_columns` returns them.
        logprobs: the log-probabilities of the same tokens; the chosen ones come first.
        row: the request's index in the batch.
        before: steps of the request's finished blocks.
    """
    assert logprobs.cu_num_generated_tokens is not None
    span = slice(*logprobs.cu_num_generated_tokens[row : row + 2])
    steps, edited = columns[span].T
    chosen = logprobs.logprobs[span, 0]
    steps = np.where(steps == NEVER, NEVER, steps + before)
    return np.stack([steps, chosen, edited], axis=1).astype(np.float64)
