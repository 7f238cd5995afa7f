# SPDX-License-Identifier: Apache-2.0
"""The best token besides some, whole and with the vocabulary cut over ranks."""

from threading import Barrier, Thread

import pytest
import torch

from vllm_dlm.kernels.next_best import next_best
from vllm_dlm.kernels.shards import VocabShard

VOCAB, ROWS, MASK = 37, 50, 36


def wanted(logits: torch.Tensor, tokens: torch.Tensor, left_out: set[int]) -> list[int]:
    found = []
    for row, token in zip(logits.tolist(), tokens.tolist(), strict=True):
        rest = [i for i in range(VOCAB) if i not in left_out | {token}]
        found.append(max(rest, key=lambda i: (row[i], -i)))
    return found


def rows(dtype: torch.dtype, ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    logits = logits.round() if ties else logits
    tokens = logits.argmax(dim=1)
    tokens[::3] = torch.arange(len(tokens[::3])) % VOCAB
    return logits.to(dtype), tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("besides", [(), (5, 30), (100,)])
def test_next_best(dtype, ties, besides):
    logits, tokens = rows(dtype, ties)
    before = logits.clone()
    got = next_best(logits, tokens, besides, ban_id=MASK)
    assert got.tolist() == wanted(logits, tokens, {*besides, MASK})
    assert torch.equal(logits, before)


def test_the_mask_id_where_it_is_allowed():
    logits, tokens = rows(torch.float32, False)
    logits[:, MASK] = 9.0
    banned = torch.arange(ROWS) % 2 == 0
    got = next_best(logits, tokens, banned=banned, ban_id=MASK)
    assert all((token == MASK) != ban for token, ban in zip(got, banned, strict=True))


def test_where_nothing_else_is_allowed():
    logits = torch.full((2, VOCAB), -torch.inf)
    logits[:, 5] = 1.0
    logits[1, 7] = 0.0
    assert next_best(logits, torch.tensor([5, 5]), ban_id=MASK).tolist() == [5, 7]


def test_over_ranks():
    """Ranks of 20 tokens, of 17 and 3 columns of padding, and of padding alone."""
    logits, tokens = rows(torch.float32, True)
    logits = torch.nn.functional.pad(logits, (0, 23), value=50.0)
    sizes, sent = (20, 17, 0), [torch.empty(0)] * 3
    barrier, results = Barrier(3), [torch.empty(0)] * 3

    def serve(rank: int) -> None:
        def gather(values: torch.Tensor) -> torch.Tensor:
            sent[rank] = values
            barrier.wait()
            everyone = torch.stack(sent)
            barrier.wait()
            return everyone

        shard = VocabShard(20 * rank, sizes[rank], gather)
        part = logits[:, 20 * rank : 20 * (rank + 1)]
        results[rank] = next_best(part, tokens, (5, 30), ban_id=MASK, shard=shard)

    ranks = [Thread(target=serve, args=(rank,)) for rank in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    expected = wanted(logits[:, :VOCAB], tokens, {5, 30, MASK})
    assert [result.tolist() for result in results] == [expected] * 3
