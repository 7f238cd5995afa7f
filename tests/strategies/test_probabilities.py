# SPDX-License-Identifier: Apache-2.0
"""`View.probabilities`: the right numbers, of the rows that are read alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.views import make_view

from vllm_dlm.strategies.probabilities import Probabilities

ROWS, WIDTH, VOCABULARY = 10, 32, 40


class Tiles:
    """Logits [N, V] that are computed three rows at a time, and how many were."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits
        self.computed = 0

    def over(self, rows: torch.Tensor):
        for begin in range(0, len(rows), 3):
            part = slice(begin, begin + 3)
            self.computed += len(rows[part])
            yield part, self.logits[rows[part]]


def sparse(row_at: np.ndarray) -> tuple[Probabilities, Tiles, torch.Tensor]:
    """Random distributions at the positions of `row_at`; [R, B, V] of them, 0 else."""
    logits = torch.randn(row_at.max() + 1, VOCABULARY)
    tiles = Tiles(logits)
    dense = torch.zeros(*row_at.shape, VOCABULARY)
    dense[torch.from_numpy(row_at >= 0)] = logits[row_at[row_at >= 0]].softmax(dim=1)
    return Probabilities(tiles, logits.double().logsumexp(1), row_at), tiles, dense


def one_a_row() -> np.ndarray:
    """A single position that is read in each row, in another order than the logits."""
    row_at = np.full((ROWS, WIDTH), -1)
    row_at[np.arange(ROWS), 3 * np.arange(ROWS)] = np.arange(ROWS)[::-1]
    return row_at


def test_probabilities_of_tokens():
    probabilities, tiles, dense = sparse(one_a_row())
    tokens = torch.randint(VOCABULARY, (ROWS, WIDTH, 5))
    found = probabilities.of(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense.gather(2, tokens))
    assert tiles.computed == ROWS


@pytest.mark.parametrize("count", [1, 7, VOCABULARY, VOCABULARY + 3])
def test_most_probable_tokens(count):
    probabilities, tiles, dense = sparse(one_a_row())
    values, ids = probabilities.top(count)
    assert tiles.computed == ROWS
    assert values.shape == ids.shape == (ROWS, WIDTH, min(count, VOCABULARY))
    read = torch.from_numpy(probabilities.rows >= 0)
    assert not values[~read].any()
    torch.testing.assert_close(values[read], dense.gather(2, ids)[read])
    best = dense[read].sort(dim=1, descending=True).values[:, :count]
    torch.testing.assert_close(values[read], best)


def test_a_part_of_the_requests_reads_its_own_rows():
    probabilities, tiles, dense = sparse(one_a_row())
    view = make_view(torch.zeros(ROWS, WIDTH), probabilities=probabilities)
    part = view.take(np.array([7, 2, 0]), 20).probabilities
    assert part is not None
    tokens = torch.zeros(3, 20, 1, dtype=torch.int64)
    # Request 7's is position 21, which is beyond the cut.
    torch.testing.assert_close(part.of(tokens), dense[[7, 2, 0], :20, :1])
    assert tiles.computed == 2


def test_where_nothing_is_read():
    nothing = np.full((2, 3), -1)
    some = sparse(one_a_row())[0]
    probabilities = Probabilities(some.logits, some.logsumexp, nothing)
    assert not probabilities.of(torch.ones(2, 3, 4, dtype=torch.int64)).any()
    values, ids = probabilities.top(4)
    assert values.shape == ids.shape == (2, 3, 0)
