# SPDX-License-Identifier: Apache-2.0
"""What all networks that are trained here have in common: a head on hidden states."""

from __future__ import annotations

from torch import Tensor, nn

from vllm_dlm.training.attention import Seen


class TrainedNetwork(nn.Module):
    """A decoder and its head, apart: most positions need no logits."""

    def forward(self, input_ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [rows, length, vocab] of token ids [rows, length].

        Args:
            input_ids: Token ids, the rows left-aligned.
            valid: Bool [rows, length], False at padding that nobody may attend to.
        """
        return self.head(self.hidden(input_ids, valid))

    def hidden(
        self,
        input_ids: Tensor,
        valid: Tensor | None = None,
        *,
        seen: Seen = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """What the last layer hands on, [rows, length, d_model].

        Args:
            input_ids: Token ids [rows, length].
            valid: As of `forward`.
            seen: Bool [rows or 1, length, length], True at the keys that a query may
                see, or segments of packed rows; by default those of the model's own
                attention.
            positions: Position ids [rows or 1, length]; by default 0, 1, 2, ...
        """
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of what the last layer hands on [..., d_model]."""
        raise NotImplementedError
