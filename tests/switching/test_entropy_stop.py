# SPDX-License-Identifier: Apache-2.0
"""The logits processor by itself: rows come, go, move, and keep what they know."""

from __future__ import annotations

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from vllm_dlm.switching.entropy import LARGE, SMALL, Model, SwitchRule
from vllm_dlm.switching.entropy_stop import EntropyStop, stop_options

VOCAB = 16
STOP = 15
RULE = SwitchRule(tau=2, window=2, min_tokens=2)


class Batch:
    """Requests of a processor, and what they wrote."""

    def __init__(self) -> None:
        self.processor = EntropyStop(None, torch.device("cpu"), False)
        self.written: dict[int, list[int]] = {}
        self.params: dict[int, SamplingParams] = {}

    def add(self, row: int, model: Model | None) -> None:
        """A new request; None: one that switching does not concern."""
        extra = None if model is None else stop_options(RULE, model, STOP)
        self.params[row] = SamplingParams(extra_args=extra)
        self.written[row] = []
        self.update(added=[row])

    def update(
        self, added: list[int] = (), removed: list[int] = (), moved: list = ()
    ) -> None:
        arrived = [(row, self.params[row], None, self.written[row]) for row in added]
        self.processor.update_state(
            BatchUpdate(
                batch_size=8, removed=list(removed), added=arrived, moved=list(moved)
            )
        )

    def step(self, bits: dict[int, int]) -> set[int]:
        """A forward in which row i's entropy is bits[i]; returns rows that ended."""
        logits = torch.full((max(bits) + 1, VOCAB), -50.0)
        for row, entropy in bits.items():
            logits[row, : 2**entropy] = 0
        result = self.processor.apply(logits)
        for row in bits:
            self.written[row].append(0)
        only_stop = (result > -torch.inf).sum(-1) == 1
        return {row for row in bits if only_stop[row] and result[row, STOP] == 0}


def test_only_the_reserved_token_is_left_when_a_turn_ends():
    batch = Batch()
    batch.add(0, SMALL)
    batch.add(1, LARGE)
    assert batch.step({0: 3, 1: 3}) == set()
    assert batch.step({0: 3, 1: 3}) == set()
    # Two are written: the small model's mean is 3, the large one's is 3, then 1.5.
    assert batch.step({0: 3, 1: 3}) == {0}
    assert batch.step({1: 0}) == {1}


def test_the_reserved_token_is_impossible_before():
    batch = Batch()
    batch.add(0, SMALL)
    logits = torch.zeros(1, VOCAB)
    logits[0, STOP] = 50
    assert batch.processor.apply(logits)[0, STOP] == -torch.inf


def test_other_requests_are_untouched():
    batch = Batch()
    batch.add(0, None)
    batch.add(1, SMALL)
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    after = batch.processor.apply(logits)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, :STOP], before[1, :STOP])
    batch.update(removed=[1])
    assert torch.equal(batch.processor.apply(before.clone()), before)


def test_rows_move_with_their_turns():
    batch = Batch()
    batch.add(0, LARGE)
    batch.add(1, SMALL)
    batch.step({0: 3, 1: 3})
    batch.step({0: 3, 1: 3})
    batch.update(moved=[(0, 1, MoveDirectionality.SWAP)])
    assert batch.step({0: 3, 1: 3}) == {0}


def test_a_request_that_was_preempted_goes_on_where_it_was():
    batch = Batch()
    batch.add(0, SMALL)
    batch.step({0: 3})
    batch.step({0: 2})
    batch.update(removed=[0])
    # It comes back with what it wrote, and its prompt in two parts: the first part's
    # token is thrown away.
    batch.update(added=[0])
    assert batch.step({0: 0}) == set()
    batch.written[0].pop()
    assert batch.step({0: 3}) == {0}  # mean of 2 and 3


def test_the_entropy_of_a_half_precision_row():
    batch = Batch()
    batch.add(0, SMALL)
    for _ in range(2):
        batch.processor.apply(torch.zeros(1, VOCAB, dtype=torch.bfloat16))
        batch.written[0].append(0)
    result = batch.processor.apply(torch.zeros(1, VOCAB, dtype=torch.bfloat16))
    assert result.argmax().item() == STOP
    assert result.softmax(-1)[0, STOP].item() == pytest.approx(1)
