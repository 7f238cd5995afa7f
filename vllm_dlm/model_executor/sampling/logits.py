# SPDX-License-Identifier: Apache-2.0
"""Logits of the rows that a step reads, a tile of rows at a time.

The logits of a whole batch would be the largest tensor of a step by far, and would grow
with the number of requests: 128 blocks of 32 positions over 126,464 tokens are a
gigabyte in bfloat16. So `DiffusionModelMixin.compute_logits` hands the sampler hidden
states, and lm_head runs here, over as many rows as `TILE_BYTES` holds; of a tile only
numbers per row are kept. What needs a row's logits later (log-probabilities, draws of
truncated distributions, `Probabilities`) has them computed again, unless all of the
step's rows are one tile.

With tensor parallelism a rank computes the logits of its own part of the vocabulary.
Statistics are merged (`VocabShard`); only rows read token by token are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from vllm_dlm.config.model import NO_MASK

if TYPE_CHECKING:
    from vllm_dlm.kernels.shards import VocabShard

TILE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Logits that exist at a time. Fewer would make lm_head's matrix product slow."""


class Head(Protocol):
    """lm_head, as `DiffusionModelMixin` has it."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V]: this rank's part of the logits of rows [n, H]."""

    def gathered(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, V]: all ranks' parts of these logits, side by side."""

    @property
    def vocab_shard(self) -> VocabShard | None:
        """Which part of the vocabulary is this rank's; None for all of it."""

    def mixed(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[n, H]: embeddings of the tokens, mixed by this rank's part of their
        probabilities [n, V]; of all ranks together."""


def tile_rows(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of logits that one tile holds."""
    most = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    return max(most // (vocab_size * dtype.itemsize), 1)


class Logits:
    """The logits of one step's N rows; see the module docstring.

    Args:
        head: computes them.
        hidden: [N, H], the rows as the network leaves them.
        rows_per_tile: as `tile_rows` says.
        mask_id: a token that no row may predict, but for some; `NO_MASK` for none.
        may_predict_mask: [N] bool: the rows that may; None for none.
    """

    def __init__(
        self,
        head: Head,
        hidden: torch.Tensor,
        rows_per_tile: int,
        mask_id: int,
        may_predict_mask: torch.Tensor | None,
    ) -> None:
        self._head = head
        self._hidden = hidden
        self._rows_per_tile = rows_per_tile
        self._only_tile: torch.Tensor | None = None
        self.mask_id = mask_id
        self.banned = None if may_predict_mask is None else ~may_predict_mask
        """[N] bool: rows in which the mask id is left out of everything; None for all
        of them."""
        self.shard = head.vocab_shard
        self.computed = 0
        """Rows that went through lm_head so far, those that did so again included."""

    @property
    def device(self) -> torch.device:
        """Where they are computed."""
        return self._hidden.device

    def __len__(self) -> int:
        return len(self._hidden)

    def banned_in(self, rows: slice | torch.Tensor) -> torch.Tensor | None:
        """As `banned`, of some rows."""
        return None if self.banned is None else self.banned[rows]

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows, a tile at a time: which they are, and their logits.

        The logits are this rank's part [n, V]; the mask id is not banned in them.
        """
        for begin in range(0, len(self), self._rows_per_tile):
            rows = slice(begin, min(begin + self._rows_per_tile, len(self)))
            yield rows, self._of(rows)

    def whole(self, part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[n, V]: what `tiles` gave of some rows, over the whole vocabulary.

        Args:
            part: [n, V'], may be changed.
            rows: [n] int64, which rows these are; the mask id is banned.
        """
        logits = self._head.gathered(part)
        if self.mask_id == NO_MASK:
            return logits
        column, banned = logits[:, self.mask_id], self.banned_in(rows)
        if banned is None:
            column.fill_(-torch.inf)
        else:
            column.masked_fill_(banned, -torch.inf)
        return logits

    def over(self, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Logits of some rows over the whole vocabulary, a tile at a time.

        Args:
            rows: [n] int64; they may repeat.

        Yields:
            Which of the n rows these are, and their logits, the mask id banned.
        """
        for part, own in self.parts(rows):
            yield part, self.whole(own, rows[part])

    def parts(self, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `over`, but of this rank's columns; the mask id is not banned in them."""
        for begin in range(0, len(rows), self._rows_per_tile):
            part = slice(begin, begin + self._rows_per_tile)
            yield part, self._of(rows[part])

    def _of(self, rows: slice | torch.Tensor) -> torch.Tensor:
        if len(self) > self._rows_per_tile:
            return self._compute(self._hidden[rows])
        if self._only_tile is None:
            self._only_tile = self._compute(self._hidden)
        return self._only_tile[rows]

    def _compute(self, hidden: torch.Tensor) -> torch.Tensor:
        self.computed += len(hidden)
        return self._head.logits(hidden)
