# SPDX-License-Identifier: Apache-2.0
"""WINO's step in the comparison that says why it is no strategy."""

import sys
from pathlib import Path

import pytest
import torch

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks.wino import revoke  # noqa: E402

sys.path.pop()

WRITTEN, MASKED = -1.0, 2.0


def places(flags: torch.Tensor) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


def test_the_first_step_writes_what_is_sure():
    confidence = torch.tensor([0.95, 0.62, 0.70, 0.30, 0.20, 0.10])
    write, remask = revoke(confidence, torch.full((6,), MASKED), 30)
    assert (places(write), places(remask)) == ([0, 1, 2], [])


@pytest.mark.parametrize(
    ("unsure", "last_written", "written", "masked_again"),
    [
        (0.75, 3, [3, 4], [1, 2]),
        # Fewer than the last step has written.
        (0.75, 2, [3, 4], [1]),
        # Who writes one token takes none back.
        (0.55, 3, [3], []),
    ],
)
def test_what_no_shadow_confirms_is_masked_again(
    unsure, last_written, written, masked_again
):
    confidence = torch.tensor([WRITTEN, WRITTEN, WRITTEN, 0.80, unsure, 0.30])
    confirmed = torch.tensor([0.99, 0.40, 0.85, MASKED, MASKED, MASKED])
    write, remask = revoke(confidence, confirmed, last_written)
    assert (places(write), places(remask)) == (written, masked_again)


def test_at_most_seven_tenths_of_the_masks_are_written():
    confidence = torch.linspace(0.7, 0.99, 10)
    write, _ = revoke(confidence, torch.full((10,), MASKED), 30)
    assert places(write) == [3, 4, 5, 6, 7, 8, 9]
    assert int(revoke(confidence[:5], torch.full((5,), MASKED), 30)[0].sum()) == 5
