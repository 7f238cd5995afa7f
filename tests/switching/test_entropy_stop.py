# SPDX-License-Identifier: Apache-2.0
"""The logits processors by themselves: requests come, go, move, and are remembered.

The same requests on both model runners. V1's processor follows rows that move; V2's is
told which slot each row belongs to.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcRequestState,
)

from vllm_dlm.switching.entropy import LARGE, SMALL, Model, SwitchRule
from vllm_dlm.switching.entropy_stop import KEY, EntropyStop, class_name, stop_options
from vllm_dlm.switching.entropy_stop_v2 import PLACES_PER_SLOT, EntropyStopV2, Places

VOCAB = 16
STOP = 15
RULE = SwitchRule(tau=2, window=2, min_tokens=2)
SLOTS = 8
PROMPT = 3
CONTEXT = 64


def params_of(model: Model | None, **options: Any) -> SamplingParams:
    """A request's; None: switching does not concern it."""
    extra = None if model is None else stop_options(RULE, model, STOP)
    return SamplingParams(extra_args=extra, **options)


def flat(bits: float) -> torch.Tensor:
    """A row whose entropy is `bits`."""
    row = torch.full((VOCAB,), -50.0)
    row[: 2 ** int(bits)] = 0
    return row


def ended(row: torch.Tensor) -> bool:
    """Whether only the reserved token is left."""
    return bool((row > -torch.inf).sum() == 1 and row[STOP] == 0)


class OnV1:
    """Requests of V1's processor, and what they wrote; a request is a row."""

    def __init__(self) -> None:
        self.processor = EntropyStop(None, torch.device("cpu"), False)
        self.written: dict[int, list[int]] = {}
        self.params: dict[int, SamplingParams] = {}

    def add(self, row: int, model: Model | None) -> None:
        self.params[row] = params_of(model)
        self.written[row] = []
        self.update(added=[row])

    def remove(self, row: int) -> None:
        self.update(removed=[row])

    def come_back(self, row: int, lost: int = 0) -> None:
        """The request of a row that was removed, without its last tokens."""
        del self.written[row][len(self.written[row]) - lost :]
        self.update(added=[row])

    def swap(self, one: int, other: int) -> None:
        self.update(moved=[(one, other, MoveDirectionality.SWAP)])

    def update(
        self, added: list[int] = (), removed: list[int] = (), moved: list = ()
    ) -> None:
        arrived = [(row, self.params[row], None, self.written[row]) for row in added]
        self.processor.update_state(
            BatchUpdate(
                batch_size=SLOTS,
                removed=list(removed),
                added=arrived,
                moved=list(moved),
            )
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.processor.apply(logits)

    def step(self, bits: dict[int, int]) -> set[int]:
        """A forward in which row i's entropy is bits[i]; returns rows that ended."""
        logits = torch.stack([flat(bits.get(row, 0)) for row in range(max(bits) + 1)])
        result = self.apply(logits)
        for row in bits:
            self.written[row].append(0)
        return {row for row in bits if ended(result[row])}

    def step_of_prompt(self, row: int) -> None:
        """A forward of a part of the prompt; its token is thrown away."""
        self.step({row: 0})
        self.written[row].pop()


class OnV2:
    """The same of V2's: a row is a request's, and has a slot that never moves."""

    def __init__(self, num_drafts: int = 0) -> None:
        tensors = {
            "all_token_ids": torch.zeros(SLOTS, CONTEXT, dtype=torch.int32),
            "prompt_len": torch.full((SLOTS,), PROMPT, dtype=torch.int32),
            "prefill_len": torch.full((SLOTS,), PROMPT, dtype=torch.int32),
            "total_len": torch.full((SLOTS,), PROMPT, dtype=torch.int32),
        }
        self.tensors = tensors
        config = SimpleNamespace(num_speculative_tokens=num_drafts)
        self.processor = EntropyStopV2(
            config,
            LogitsProcRequestState(
                device=torch.device("cpu"),
                max_num_reqs=SLOTS,
                vocab_size=VOCAB,
                **{name: SimpleNamespace(gpu=each) for name, each in tensors.items()},
            ),
        )
        self.params: dict[int, SamplingParams] = {}
        self.slots: dict[int, int] = {}
        self.written: dict[int, int] = {}

    def add(self, row: int, model: Model | None, **options: Any) -> bool:
        self.params[row] = params_of(model, **options)
        return self._enter(row, 0)

    def _enter(self, row: int, written: int) -> bool:
        free = set(range(SLOTS)) - set(self.slots.values())
        slot = self.slots[row] = max(free)
        self.written[row] = written
        self.tensors["total_len"][slot] = PROMPT + written
        is_turn = self.processor.add_request(slot, self.params[row])
        self.processor.apply_staged_writes()
        return is_turn

    def remove(self, row: int) -> None:
        del self.slots[row]

    def come_back(self, row: int, lost: int = 0) -> None:
        # Its slot has been another's meanwhile.
        self.add(99, LARGE)
        self._enter(row, self.written[row] - lost)
        self.remove(99)

    def swap(self, one: int, other: int) -> None:
        self.slots[one], self.slots[other] = self.slots[other], self.slots[one]

    def apply(
        self,
        logits: torch.Tensor,
        rows: list[int] | None = None,
        before: int = 0,
        input_ids: list[int] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            rows: the request of each row; that of the same number without.
            before: how many tokens of the prompt are still to come.
            input_ids: of each row.
        """
        rows = list(range(len(logits))) if rows is None else rows
        # Rows without a request belong to a slot that nobody has.
        empty = min(set(range(SLOTS)) - set(self.slots.values()))
        slots = [self.slots.get(row, empty) for row in rows]
        offsets = [rows[:i].count(row) for i, row in enumerate(rows)]
        totals = self.tensors["total_len"][torch.tensor(slots)]
        offset = torch.tensor(offsets)
        of_requests = np.array(list(dict.fromkeys(slots)))
        return self.processor.apply(
            logits,
            LogitsContext(
                expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
                idx_mapping=torch.from_numpy(of_requests),
                idx_mapping_np=of_requests,
                expanded_local_pos=offset.int(),
                input_ids=torch.tensor(input_ids or [0] * len(rows)),
                pos=totals - 1 + offset - before,
                seq_lens_upper_bound_np=np.full(len(of_requests), CONTEXT),
            ),
        )

    def step(self, bits: dict[int, int]) -> set[int]:
        logits = torch.stack([flat(bits.get(row, 0)) for row in range(max(bits) + 1)])
        result = self.apply(logits)
        for row in bits:
            self._write(row, 1)
        return {row for row in bits if ended(result[row])}

    def _write(self, row: int, count: int) -> None:
        self.written[row] += count
        self.tensors["total_len"][self.slots[row]] += count

    def step_of_prompt(self, row: int) -> None:
        self.apply(flat(0)[None], [row], before=1)


@pytest.fixture(params=[OnV1, OnV2])
def batch(request: pytest.FixtureRequest) -> Any:
    return request.param()


def test_only_the_reserved_token_is_left_when_a_turn_ends(batch):
    batch.add(0, SMALL)
    batch.add(1, LARGE)
    assert batch.step({0: 3, 1: 3}) == set()
    assert batch.step({0: 3, 1: 3}) == set()
    # Two are written: the small model's mean is 3, the large one's is 3, then 1.5.
    assert batch.step({0: 3, 1: 3}) == {0}
    assert batch.step({1: 0}) == {1}


def test_the_reserved_token_is_impossible_before(batch):
    batch.add(0, SMALL)
    logits = torch.zeros(1, VOCAB)
    logits[0, STOP] = 50
    assert batch.apply(logits)[0, STOP] == -torch.inf


def test_other_requests_are_untouched(batch):
    batch.add(0, None)
    batch.add(1, SMALL)
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    after = batch.apply(logits)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, :STOP], before[1, :STOP])
    batch.remove(1)
    assert torch.equal(batch.apply(before.clone()), before)


def test_rows_move_with_their_turns(batch):
    batch.add(0, LARGE)
    batch.add(1, SMALL)
    batch.step({0: 3, 1: 3})
    batch.step({0: 3, 1: 3})
    batch.swap(0, 1)
    assert batch.step({0: 3, 1: 3}) == {0}


def test_a_request_that_was_preempted_goes_on_where_it_was(batch):
    batch.add(0, SMALL)
    batch.step({0: 3})
    batch.step({0: 2})
    batch.remove(0)
    # It comes back with what it wrote, and its prompt in two parts: the first part's
    # token is thrown away.
    batch.come_back(0)
    batch.step_of_prompt(0)
    assert batch.step({0: 3}) == {0}  # mean of 2 and 3


def test_a_token_that_was_lost_is_judged_again(batch):
    batch.add(0, SMALL)
    batch.step({0: 3})
    batch.step({0: 3})
    assert batch.step({0: 0}) == set()  # mean of 3 and 0
    batch.remove(0)
    batch.come_back(0, lost=1)
    assert batch.step({0: 2}) == {0}  # of 3 and 2


def test_a_new_request_knows_nothing_of_the_slots_last_one(batch):
    batch.add(0, SMALL)
    for _ in range(3):
        batch.step({0: 3})
    batch.remove(0)
    batch.add(0, SMALL)
    assert batch.step({0: 0}) == set()
    assert batch.step({0: 0}) == set()
    assert batch.step({0: 3}) == set()  # mean of 0 and 3


def test_the_entropy_of_a_half_precision_row():
    batch = OnV1()
    batch.add(0, SMALL)
    for _ in range(2):
        batch.processor.apply(torch.zeros(1, VOCAB, dtype=torch.bfloat16))
        batch.written[0].append(0)
    result = batch.processor.apply(torch.zeros(1, VOCAB, dtype=torch.bfloat16))
    assert result.argmax().item() == STOP
    assert result.softmax(-1)[0, STOP].item() == pytest.approx(1)


def test_rows_of_drafts_are_judged_one_by_one():
    """A request with three drafts has four rows; the turn ends at one in the middle."""
    batch = OnV2(num_drafts=3)
    batch.add(0, SMALL)
    batch.add(1, LARGE)
    rows = [0, 0, 0, 0, 1]
    result = batch.apply(torch.stack([flat(b) for b in (3, 0, 2, 2, 3)]), rows)
    # Tokens 0 to 3: the means of the last two are 1.5, 1 and 2; two must be written.
    assert [ended(row) for row in result] == [False, False, False, True, False]
    # The first two drafts are rejected: their entropies do not count any longer.
    batch._write(0, 2)
    batch._write(1, 1)
    result = batch.apply(torch.stack([flat(b) for b in (3, 3, 3, 3, 3)]), rows)
    # Token 2: mean of 0 and 3.
    assert [ended(row) for row in result] == [False, True, True, True, False]


def test_a_repetition_penalty_does_not_change_the_entropy():
    """As on runner V1, which applies the penalty behind the processor."""
    torch.manual_seed(0)
    plain = 3 * torch.randn(6, VOCAB)
    ids = torch.tensor([2, 5, 5, 9])
    penalty = 1.7
    seen = torch.zeros(6, VOCAB, dtype=torch.bool)
    seen[:, ids] = True
    # Two rows of drafts 7 and 1 behind the text; the same with one draft, and none.
    drafts = [0, 7, 1, 0, 7, -1]
    seen[[1, 2, 4, 5], 7] = True
    seen[2, 1] = True
    scaled = torch.where(plain > 0, plain / penalty, plain * penalty)
    batch = OnV2(num_drafts=2)
    for row in (0, 1):
        batch.add(row, SMALL, repetition_penalty=penalty)
        slot = batch.slots[row]
        batch.tensors["all_token_ids"][slot, :4] = ids
        # What a request before it has left there.
        batch.tensors["all_token_ids"][slot, 4:] = 12
        batch._write(row, 1)
    batch.apply(torch.where(seen, scaled, plain), [0, 0, 0, 1, 1, 1], input_ids=drafts)
    probabilities = plain.double().softmax(-1)
    expected = -(probabilities * probabilities.log2()).sum(-1)
    kept = batch.processor._entropies
    places = [0, 0, 0, 1, 1, 1]
    assert kept[places, [1, 2, 3] * 2].double() == pytest.approx(expected, abs=1e-5)


def test_a_place_is_taken_from_the_turn_that_came_longest_ago():
    places = Places(4)
    assert [places.take(slot, slot) for slot in (0, 1)] == [(0, True), (1, True)]
    # Turn 0 is preempted, and turns 2 and 3 come into its slot.
    assert places.take(0, 2) == (2, True)
    assert places.take(0, 3) == (3, True)
    assert places.take(0, 0) == (0, False)  # it comes back
    # Turn 1 still runs; turn 2 came before turns 3 and 0.
    assert places.take(2, 4) == (2, True)
    places.leave(1)
    assert places.take(3, 5) == (1, True)


def test_what_is_lost_fills_again():
    """More turns than places come between: the window is filled anew."""
    batch = OnV2()
    batch.add(0, SMALL)
    batch.step({0: 3})
    batch.step({0: 3})
    batch.remove(0)
    for _ in range(PLACES_PER_SLOT * SLOTS):
        batch.add(1, SMALL)
        batch.remove(1)
    batch._enter(0, 2)
    assert batch.step({0: 3}) == set()
    assert batch.step({0: 3}) == {0}


@pytest.mark.parametrize("kind", [EntropyStop, EntropyStopV2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"turn": -1}, "turn: .*greater than or equal to 0"),
        ({"model": "middle"}, "model: .*'small' or 'large'"),
        ({"rule": {"tau": math.nan}}, "tau"),
    ],
)
def test_what_is_not_valid_is_refused(kind, change, message):
    kind.validate_params(params_of(SMALL))
    kind.validate_params(params_of(None))
    options = {**stop_options(RULE, SMALL, STOP)[KEY], **change}
    with pytest.raises(ValueError, match=f"ead: .*{message}"):
        kind.validate_params(SamplingParams(extra_args={KEY: options}))


def test_the_runner_chooses():
    for is_v2, kind in ((False, EntropyStop), (True, EntropyStopV2)):
        name = class_name(SimpleNamespace(use_v2_model_runner=is_v2))
        assert name == f"{kind.__module__}:{kind.__name__}"
