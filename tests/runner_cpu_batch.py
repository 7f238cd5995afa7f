# SPDX-License-Identifier: Apache-2.0
"""Random batches of model runner V2, as tensors and as lists."""

import torch

SEEDS = range(4)
MAX_REQS = 7
MAX_TOKENS = 96
MODEL_LEN = 64
DRAFTS = 8


class Batch:
    """A random batch: tensors as the runner holds them, and the same as lists."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def ints(low, high, *shape, dtype=torch.int32):
            return torch.randint(low, high, shape, generator=random, dtype=dtype)

        self.ints = ints
        self.random = random
        self.num_reqs = int(ints(1, MAX_REQS, 1))
        self.idx_mapping = torch.randperm(MAX_REQS, generator=random)[: self.num_reqs]
        self.query_lens = ints(1, MAX_TOKENS // MAX_REQS, self.num_reqs)
        self.query_start_loc = cumulative(self.query_lens)
        self.num_tokens = int(self.query_start_loc[-1])
        self.num_logits = torch.minimum(self.query_lens, ints(0, DRAFTS, self.num_reqs))
        self.cu_num_logits = cumulative(self.num_logits)
        self.computed = ints(0, MODEL_LEN - MAX_TOKENS // MAX_REQS, MAX_REQS)
        self.prefill_lens = ints(1, MODEL_LEN, MAX_REQS)
        self.token_ids = ints(0, 1000, MAX_REQS, MODEL_LEN)
        self.seq_lens = self.computed[self.idx_mapping] + self.query_lens
        # Two rows on the edges: the prompt ends where the logits start, or the query.
        for row, back in enumerate((int(self.num_logits[0]), 0)):
            if row < self.num_reqs:
                slot = self.idx_mapping[row]
                self.prefill_lens[slot] = self.seq_lens[row] - back


def cumulative(lengths: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros(1, dtype=torch.int32)
    return torch.cat((zero, lengths.cumsum(0))).to(torch.int32)


def addresses(tensors) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)
