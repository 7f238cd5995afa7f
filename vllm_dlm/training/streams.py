# SPDX-License-Identifier: Apache-2.0
"""Rows of two streams, with which a block-causal model is trained on all its blocks.

A row holds a text twice: clean, and once more with masks. A token of the masked stream
sees its own block there and the clean blocks to the left, which is what it sees while
decoding; a clean token sees the clean blocks up to its own (SDAR, arXiv 2510.06303). So
one forward learns from every block, each behind a clean text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_dlm.training.block_causal import BlockCausalModel

CLEAN = -1
NO_TEXT = -1


@dataclass(frozen=True)
class Streams:
    """Some rows of two streams, the tokens of a row in any order; tensors [R, L].

    Args:
        inputs: Token ids, with masks in the masked stream.
        targets: The same without masks.
        weights: What a token's cross-entropy counts; 0 where no mask stands.
        positions: Each token's place in its text, from 0; both streams count alike.
        texts: Which text of its row a token belongs to; no token sees another text.
            `NO_TEXT` is padding, which only padding sees.
        copies: `CLEAN` for a token of the clean stream; for one of the masked stream
            the number of its copy of the text: copies do not see each other.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    texts: Tensor
    copies: Tensor

    def seen(self, block_length: int) -> Tensor:
        """Bool [R, L, L], True where a query (dim 1) sees a key (dim 2).

        Args:
            block_length: Tokens per block; blocks are counted from a text's start.
        """
        blocks = self.positions // block_length
        query, key = blocks[:, :, None], blocks[:, None, :]
        clean_query = (self.copies == CLEAN)[:, :, None]
        clean_key = (self.copies == CLEAN)[:, None, :]
        same_block = key == query
        same_copy = self.copies[:, :, None] == self.copies[:, None, :]
        same_text = self.texts[:, :, None] == self.texts[:, None, :]
        clean_keys = (key < query) | (clean_query & same_block)
        masked_keys = same_copy & same_block
        return same_text & torch.where(clean_key, clean_keys, masked_keys)


class TwoStreams(nn.Module):
    """A block-causal model whose forward takes rows of two streams."""

    def __init__(self, model: BlockCausalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Logits [R, L, vocab]; the arguments are those of `DecoderModel.hidden`."""
        return self.model.head(self.model.hidden(ids, seen=seen, positions=positions))
