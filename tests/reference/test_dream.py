# SPDX-License-Identifier: Apache-2.0
"""Dream's schedule, and full attention whose logits are shifted by a row."""

from __future__ import annotations

import pytest
import torch
from reference.layers import KVStore
from reference.llada import TinyLLaDA, write_random_checkpoint
from reference.procedures import (
    CACHES,
    DREAM_ALGS,
    View,
    dream,
    generate,
    static,
    threshold,
)

PROMPT = [5, 17, 93, 2, 41, 60, 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyLLaDA:
    folder = tmp_path_factory.mktemp("llada")
    return TinyLLaDA.from_folder(write_random_checkpoint(folder, seed=0))


class Recorded:
    """A model that notes each forward's first row, its last, and the store's length."""

    def __init__(self, model: TinyLLaDA) -> None:
        self.model, self.mask_id, self.eos_id = model, model.mask_id, model.eos_id
        self.calls: list[tuple[int, int, int]] = []

    def new_store(self, length: int) -> KVStore:
        return self.model.new_store(length)

    def forward(self, input_ids, positions, store=None) -> torch.Tensor:
        length = 0 if store is None else len(store)
        self.calls.append((positions[0], positions[-1], length))
        return self.model.forward(input_ids, positions, store)


class Shifted(Recorded):
    """Row i says what row i + 1 of the model does: a shift of one undoes it."""

    def forward(self, input_ids, positions, store=None) -> torch.Tensor:
        logits = super().forward(input_ids, positions, store)
        return torch.cat([logits[1:], torch.full_like(logits[:1], torch.nan)])


def view_of(masks: int, step: int, steps: int, scores: torch.Tensor) -> View:
    width = len(scores)
    return View(
        masked=torch.arange(width) < masks,
        argmax=torch.zeros(width, dtype=torch.int64),
        confidence=scores,
        margin=1 - scores,
        entropy=scores,
        first=0,
        forward=step,
        scheduled=1,
        step=step,
        steps=steps,
    )


def counts(masks: int, steps: int) -> list[int]:
    scores = torch.linspace(1.0, 0.1, masks)
    found: list[int] = []
    for step in range(steps):
        view = view_of(masks - sum(found), step, steps, scores)
        found.append(len(dream().select(view)))
    return found


@pytest.mark.parametrize("length", [8, 64, 128, 256, 512])
def test_as_many_steps_as_masks_begin_with_an_idle_one(length):
    assert counts(length, length) == [0, *[1] * (length - 2), 2]


@pytest.mark.parametrize("steps", [4, 32, 64, 128])
def test_half_as_many_steps_as_masks(steps):
    assert counts(2 * steps, steps) == [1, *[2] * (steps - 2), 3]


def test_other_counts():
    assert counts(16, 4) == [3, 4, 4, 5]
    assert counts(7, 1) == [7]


def test_scores():
    scores = torch.tensor([0.5, 0.9, 0.1, 0.7])
    view = view_of(4, 0, 2, scores)  # int(4 (1 - .5005)) = 1
    assert dream("maskgit_plus").select(view) == [1]
    assert dream("topk_margin").select(view) == [2]
    assert dream("entropy").select(view) == [2]


def test_chance():
    scores = torch.tensor([0.5, 0.9, 0.1, 0.7])
    view = view_of(4, 0, 2, scores)
    half = torch.tensor([0.1, 0.6, 0.49, 0.5])  # share: 1 - .5005
    assert dream("origin", uniform=lambda _: half).select(view) == [0, 2]
    last = view_of(4, 1, 2, scores)
    assert dream("origin", uniform=lambda _: half).select(last) == [0, 1, 2, 3]
    # Noise -log(-log u) is .37, .34, .67, -.83; scores / .1 are 5, 9, 1, 7.
    for temperature, chosen in ((0.1, [1]), (100.0, [2])):
        rule = dream("maskgit_plus", 1e-3, temperature, lambda _: half.flip(0))
        assert rule.select(view) == chosen
    with pytest.raises(ValueError, match="uniform"):
        dream("origin")
    with pytest.raises(ValueError, match="uniform"):
        dream(alg_temp=0.1)
    with pytest.raises(ValueError, match="topk_margin"):
        dream("random")


@pytest.mark.parametrize("rule", [static(), threshold(0.6), dream("entropy")])
def test_a_shift_reads_the_row_to_the_left(model, rule):
    options = {"gen_length": 24, "block_length": 8, "eos_stop": False, "rule": rule}
    shifted = generate(Shifted(model), PROMPT, shift=1, **options)
    assert shifted == generate(model, PROMPT, **options)


def test_position_zero_is_predicted_by_its_own_row(model):
    options = {"gen_length": 4, "block_length": 4, "eos_stop": False, "steps": 1}
    result = generate(model, [], rule=static(), shift=1, **options)
    logits = model.forward([model.mask_id] * 4)[[0, 0, 1, 2]]
    logits[:, model.mask_id] = -torch.inf
    assert result.tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("cache", "calls"),
    [
        ("none", [(0, 14, 0)] * 4),
        ("prefix", [(0, 14, 15), (6, 14, 15), (0, 14, 15), (10, 14, 15)]),
        ("dual", [(0, 14, 15), (6, 10, 15), (0, 14, 15), (10, 14, 15)]),
    ],
)
def test_later_steps_compute_one_row_more(model, cache, calls):
    recorded = Recorded(model)
    options = {"gen_length": 8, "block_length": 4, "steps": 4, "eos_stop": False}
    generate(recorded, PROMPT, rule=static(), cache=cache, shift=1, **options)
    assert recorded.calls == calls


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("alg", DREAM_ALGS)
def test_a_request_takes_its_steps(model, alg, cache):
    table = torch.rand(32, 8, generator=torch.Generator().manual_seed(0))
    rule = dream(alg, uniform=lambda view: table[view.forward])
    result = generate(
        model,
        PROMPT,
        gen_length=32,
        block_length=8,
        rule=rule,
        cache=cache,
        shift=1,
        eos_stop=False,
    )
    assert model.mask_id not in result.tokens
    if alg == "origin":
        assert result.forwards <= 32
        return
    assert result.forwards == 32
    in_step = [result.step_of_position.count(step) for step in range(32)]
    assert in_step == [0, 1, 1, 1, 1, 1, 1, 2] * 4


def test_a_block_ends_with_its_steps_where_the_mask_id_was_chosen(model):
    options = {"gen_length": 8, "block_length": 8, "eos_stop": False}
    model = Recorded(model)
    model.forward = lambda ids, *_: torch.eye(128)[[model.mask_id] * len(ids)]
    rule = dream("maskgit_plus")
    result = generate(model, [], rule=rule, forbid_mask=False, steps=4, **options)
    assert result.tokens == [model.mask_id] * 8 and result.forwards == 4
