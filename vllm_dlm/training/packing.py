# SPDX-License-Identifier: Apache-2.0
"""Packed rows: rows of different lengths side by side instead of padded to one length.

Each row sees only itself, and keeps its own positions, so that a network gives the
same as for padded rows. Where xformers can compute it, all rows of a batch are one long
row; its cost is that of the rows. A masked product costs the square of the length that
it is computed over, whatever the mask leaves out. So elsewhere there are several
packed rows, none longer than the longest row of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_dlm.training.attention import Seen, Segments, has_xformers

WORTH_PACKING = 0.9
"""Packed, a batch has at most this share of its padded positions, or stays padded."""


def hidden_at(
    network: Any,
    ids: Tensor,
    valid: Tensor | None,
    where: Tensor,
    *,
    packed: bool | None = None,
    dtype: torch.dtype = torch.float32,
    seen: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """What a network's last layer hands on at some positions, [n, size].

    Args:
        network: Has `hidden`, as of `LLaDAModel` and `DecoderModel`.
        ids: Token ids [R, L].
        valid: Bool [R, L], False at padding; None where there is none.
        where: Bool [R, L], with n True, none of them at padding.
        packed: Whether rows are packed; None: if that leaves out a tenth of them.
        dtype: That attention is computed in.
        seen: Bool [R or 1, L, L], as of `hidden`.
        positions: [R or 1, L], as of `hidden`.
    """
    block = getattr(network, "attention_block", None)
    full = seen is None and block is None
    rows = None
    if valid is not None and packed is not False:
        one_row = full and has_xformers(ids.device, dtype, network.head_dim)
        rows = pack_rows(valid, one_row=one_row)
        if packed is None and not is_worth_packing(valid, rows):
            rows = None
    if rows is None:
        return network.hidden(ids, valid, seen=seen, positions=positions)[where]
    places = rows.position
    if positions is not None:
        places = rows.pack(positions.expand_as(ids))
    visible: Seen = rows.mask(seen, block) if rows.lengths is None else rows.segments()
    hidden = network.hidden(rows.pack(ids), seen=visible, positions=places)
    return rows.at(hidden, where)


@dataclass(frozen=True)
class PackedRows:
    """Where the tokens of a padded batch [R, L] lie in packed rows [N, W].

    Args:
        source: [N, W], place in the flattened batch; 0 at padding.
        row: [N, W], number of the row that a token is from; -1 at padding.
        position: [N, W], position in that padded row; 0 at padding.
        place: [R, L], place in the flattened packed rows; 0 at padding.
        valid: Bool [R, L], False at padding of the batch.
        lengths: Of the rows, in their order, where they are one packed row without
            padding, N = 1.
    """

    source: Tensor
    row: Tensor
    position: Tensor
    place: Tensor
    valid: Tensor
    lengths: tuple[int, ...] | None

    def pack(self, batch: Tensor) -> Tensor:
        """[R, L, ...] -> [N, W, ...]; what stands at padding has no meaning."""
        return batch.flatten(0, 1)[self.source]

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, W, ...] -> [R, L, ...], 0 at padding."""
        found = packed.flatten(0, 1)[self.place]
        return found.masked_fill(
            ~self.valid.reshape(*self.valid.shape, *[1] * (found.dim() - 2)), 0
        )

    def at(self, packed: Tensor, where: Tensor) -> Tensor:
        """The places of a batch `where` (bool [R, L]) says: [N, W, ...] -> [n, ...]."""
        return packed.flatten(0, 1)[self.place[where]]

    def mask(
        self, seen: Tensor | None = None, attention_block: int | None = None
    ) -> Tensor:
        """What a position sees, bool [N, W, W]: of its own row, and of that all.

        Args:
            seen: Bool [R or 1, L, L], what a position sees of its padded row.
            attention_block: In place of `seen`: positions of a block of a block-causal
                network, in which a position sees its block and those left of it.
        """
        mask = self.row[:, None, :] == self.row[:, :, None]
        if seen is not None:
            rows = self.row.clamp(min=0, max=len(seen) - 1)
            mask &= seen[
                rows[:, :, None], self.position[:, :, None], self.position[:, None, :]
            ]
            # Padding has to see something: a softmax over nothing is no number.
            mask |= (self.row < 0)[:, :, None]
        elif attention_block is not None:
            block = self.position // attention_block
            mask &= block[:, None, :] <= block[:, :, None]
        return mask

    def segments(self) -> Segments:
        """The same of full attention for xformers; only of one packed row."""
        assert self.lengths is not None
        return Segments.of(self.lengths, self.row.device)


def pack_rows(valid: Tensor, *, one_row: bool) -> PackedRows:
    """Where to put the tokens of a batch.

    Args:
        valid: Bool [R, L], False at padding, wherever that is.
        one_row: All into one row, instead of into as few as can be found that are not
            longer than the longest of the batch.

    Raises:
        ValueError: there is nothing but padding.
    """
    device, (count, width) = valid.device, valid.shape
    tokens = [each.nonzero()[:, 0] for each in valid.cpu()]
    lengths = [len(each) for each in tokens]
    if not any(lengths):
        raise ValueError("rows to be packed have nothing but padding")
    bins = [list(range(count))] if one_row else _fill(lengths)
    longest = max(sum(lengths[row] for row in each) for each in bins)
    row = torch.full((len(bins), longest), -1)
    position = torch.zeros_like(row)
    for number, rows in enumerate(bins):
        begin = 0
        for each in rows:
            end = begin + lengths[each]
            row[number, begin:end] = each
            position[number, begin:end] = tokens[each]
            begin = end
    filled = row >= 0
    source = torch.where(filled, row * width + position, 0)
    place = torch.zeros(count * width, dtype=torch.long)
    place[source[filled]] = filled.flatten().nonzero()[:, 0]
    return PackedRows(
        source.to(device),
        row.to(device),
        position.to(device),
        place.view(count, width).to(device),
        valid,
        tuple(filter(None, lengths)) if one_row else None,
    )


def is_worth_packing(valid: Tensor, packed: PackedRows) -> bool:
    """Whether so much less is computed that the work of packing is paid for."""
    return packed.source.numel() <= WORTH_PACKING * valid.numel()


def _fill(lengths: Sequence[int]) -> list[list[int]]:
    """Rows by packed row: each, the longest first, into the first that has room."""
    most = max(lengths)
    bins: list[list[int]] = []
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        number = next(
            (i for i, room in enumerate(free) if room >= lengths[row]), len(bins)
        )
        if number == len(bins):
            bins.append([])
            free.append(most)
        bins[number].append(row)
        free[number] -= lengths[row]
    return bins
