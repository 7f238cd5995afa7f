# SPDX-License-Identifier: Apache-2.0
"""DMax: runs of masks, edits of all that is written, and the end of a block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reference.soft_inputs import mixed_with_mask
from reference.views import CPU, make_view, select

from vllm_dlm.strategies.base import Decision, View
from vllm_dlm.strategies.dmax import DMax, DMaxParams
from vllm_dlm.testing import check_strategy

WIDTH = 8
CONFIDENCE = [0.99, 0.97, 0.80, 0.55, 0.78, 0.93, 0.40, 0.76]
"""Position 0 is decided; 1 to 7 are masks."""


def view(
    confidence: list[float], masked: list[bool], step: int = 1, **more: torch.Tensor
) -> View:
    made = make_view(
        [confidence],
        torch.tensor([masked]),
        step=torch.tensor([step]),
        state={"active": torch.ones(1, len(masked), dtype=torch.bool)},
    )
    made = replace(made, best=made.candidate, best_confidence=made.confidence)
    return replace(made, **more)


def decide(seen: View, **params: float | bool) -> Decision:
    strategy = DMax(DMaxParams(**params), seen.masked.shape[1], replace(CPU, mask_id=3))
    return select(strategy, seen)


@pytest.mark.parametrize(
    ("threshold", "sure", "written"),
    [(0.5, 0.9, [1, 2, 3, 4, 5]), (0.65, 0.9, [1, 2]), (0.98, 0.98, [1])],
)
def test_worked_runs(threshold: float, sure: float, written: list[int]):
    """A run, not a set: 7 is as sure as 2 is, and stands behind a doubt."""
    seen = view(CONFIDENCE, [False] + [True] * 7)
    decision = decide(seen, threshold=threshold, sure=sure)
    assert decision.commit[0].nonzero()[:, 0].tolist() == written


def test_written_tokens_follow_the_model_whatever_its_confidence():
    seen = view([0.01, 0.9, 0.9], [False, False, True])
    best = seen.tokens.clone()
    best[0, 0] += 1
    decision = decide(replace(seen, best=best))
    assert decision.edit is not None and decision.edit.tolist() == [
        [True, False, False]
    ]
    assert decision.new_tokens is not None
    assert decision.new_tokens[0, 0] == best[0, 0]


@pytest.mark.parametrize(
    ("confidence", "changes", "step", "holds"),
    [
        ([0.95, 0.9, 0.99], True, 1, False),  # all are sure
        ([0.95, 0.89, 0.99], True, 1, True),
        ([0.95, 0.89, 0.99], False, 1, False),  # nothing has changed
        ([0.95, 0.89, 0.99], True, 2, False),  # as many steps as positions
    ],
)
def test_the_end_of_a_block(
    confidence: list[float], changes: bool, step: int, holds: bool
):
    seen = view(confidence, [False] * 3, step)
    best = seen.tokens + int(changes)
    decision = decide(replace(seen, best=best, candidate=best))
    assert decision.hold is not None and decision.hold.tolist() == [holds]


def test_what_was_not_masked_stays_out_of_it():
    """What the block did not begin with is neither changed nor waited for."""
    active = torch.tensor([[False, True]])
    seen = view([0.1, 0.95], [False, False])
    best = seen.tokens + 1
    decision = decide(replace(seen, best=best, state={"active": active}))
    assert decision.edit is not None and decision.soft is not None
    assert decision.edit.tolist() == [[False, True]]
    assert decision.soft.where.tolist() == [[False, True]]
    assert decision.hold is not None and decision.hold.tolist() == [False]


def test_what_is_fed():
    """The best token and the mask, by how sure the model is; a drawn one is only
    written."""
    seen = view([0.6, 0.55, 0.3], [True, True, True], step=0)
    best = seen.candidate + 1
    sure = torch.tensor([[0.7, 0.55, 0.3]])
    decision = decide(replace(seen, best=best, best_confidence=sure))
    soft = decision.soft
    assert soft is not None and soft.ids is not None
    assert soft.where.tolist() == [[True, True, False]]
    assert soft.ids[0, :, 0].tolist() == best[0].tolist()
    assert soft.ids[0, :, 1].tolist() == [3, 3, 3]
    torch.testing.assert_close(soft.weights[0, 0], torch.tensor([0.7, 0.3]))
    assert decision.new_tokens is not None
    assert decision.new_tokens[0, 0] == seen.candidate[0, 0]
    assert decide(replace(seen, best=best), soft=False).soft is None


@pytest.mark.parametrize(
    ("sure", "wanted"), [(0.95, (2.9482, 0.1034)), (0.6, (2.3759, 1.0560))]
)
def test_worked_mixtures(sure: float, wanted: tuple[float, float]):
    token, mask = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])
    found = mixed_with_mask(sure, token, mask).tolist()
    assert found == pytest.approx(wanted, abs=6e-5)


def test_a_block_must_not_end_with_masks():
    with pytest.raises(ValueError, match="threshold 0.95 is above `sure`, 0.9"):
        DMax.validate(DMaxParams(threshold=0.95), 32, CPU)
    DMax.validate(DMaxParams(threshold=0.9), 32, CPU)


@pytest.mark.parametrize("soft", [True, False])
def test_the_contract(soft: bool):
    check_strategy(DMax, params={"soft": soft}, compiling="trace", required=True)
