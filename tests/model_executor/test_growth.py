# SPDX-License-Identifier: Apache-2.0
"""Growth: by how much a canvas grows, and the options that say so."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.growing import Growing

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.layout import Limits, lay_out
from vllm_dlm.model_executor.sampling.growth import (
    Ends,
    expansion_of,
    in_units,
    with_block,
)

FULL = ModelDefaults("threshold", 32, mask_token_id=9)
BLOCKS = ModelDefaults("threshold", 32, mask_token_id=9, attention="block")


def lacks(
    policy: Growing, ends: list[bool], confidence: list[float], width: int
) -> int:
    """As the engine says, of a canvas whose first `width` masks are the block."""
    window = policy.window if policy.rule == "daedal" else 0
    ahead = Ends(*(torch.zeros(1, dtype=torch.int64) for _ in range(3)))
    for is_end, sure in reversed(
        list(zip(ends[width:], confidence[width:], strict=True))
    ):
        counts = is_end and int(ahead.number) < window
        units = in_units(torch.tensor([sure])) * counts
        ahead = Ends(ahead.number + is_end, ahead.sure + units, ahead.masks + 1)
    masked = torch.ones(1, width, dtype=torch.bool)
    whole = with_block(
        ahead,
        torch.tensor([ends[:width]]),
        torch.tensor([confidence[:width]]),
        masked,
        torch.tensor([window]),
    )
    found = expansion_of(
        whole,
        torch.tensor([policy.expansion]),
        torch.tensor([window]),
        torch.tensor([policy.threshold]),
    )
    return int(found)


@pytest.mark.parametrize(
    ("ends", "threshold", "wanted"),
    [
        # .4 and more is enough; then each tenth that lacks doubles the expansion.
        (40, 0.4, 0),
        (39, 0.4, 8),
        (31, 0.4, 8),
        (29, 0.4, 16),
        (15, 0.4, 32),
        (9, 0.4, 64),
        (0, 0.4, 64),
        (0, 1.0, 64),
    ],
)
def test_density(ends: int, threshold: float, wanted: int):
    policy = Growing("rho_eos", threshold=threshold)
    flags = [False] * (100 - ends) + [True] * ends
    assert lacks(policy, flags, [0.9] * 100, 32) == wanted
    assert policy.lacks(flags, [0.9] * 100) == wanted


def test_confidence_counts_the_rightmost_ends():
    policy = Growing("daedal", expansion=8, threshold=0.5, window=4)
    sure = [0.9] * 4 + [0.6, 0.1, 0.6, 0.6, 0.6]
    ends = [True] * 5 + [False] + [True] * 3
    assert lacks(policy, ends, sure, 4) == 0  # the mean of four times 0.6
    sure[7] = 0.1
    assert lacks(policy, ends, sure, 4) == 8
    # Three ends of four: nothing stands for the fourth.
    assert lacks(policy, [False] * 6 + [True] * 3, [0.65] * 9, 4) == 8
    assert lacks(policy, [False] * 6 + [True] * 3, [0.7] * 9, 4) == 0


@given(seed=st.integers(0, 2**20), rule=st.sampled_from(["daedal", "rho_eos"]))
def test_agrees_with_plain_loops(seed: int, rule: str):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, generator=generator)
    width = 1 + int(draw[0] * 8)
    count = width + int(draw[1] * 40)
    policy = Growing(rule, 16, 3, float(draw[2]) + 1e-3, 1 + int(draw[3] * 20))
    confidence = torch.rand(count, generator=generator)
    ends = (torch.rand(count, generator=generator) < draw[2]).tolist()
    got = lacks(policy, ends, confidence.tolist(), width)
    assert got == policy.lacks(ends, confidence.tolist())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 30 + 256),
        ({"growth": "daedal"}, 30 + 64),
        ({"growth": "rho_eos", "growth_config": {"initial": 65}}, 30 + 96),
        ({"growth": "daedal", "growth_config": {"initial": 4096}}, 30 + 256),
    ],
)
def test_a_canvas_is_opened_with_whole_blocks(options: dict, wanted: int):
    config = resolve(DlmConfig(), {"dlm": options}, FULL).sized(250, 512)
    layout = lay_out(
        config, FULL, Limits(512, 2048), prompt_len=30, num_known=30, max_tokens=250
    )
    assert layout.canvas_from(30) == wanted


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"growth": "eos"}, FULL, "'none', 'daedal' or 'rho_eos'"),
        ({"growth": "daedal"}, BLOCKS, "is for models with full attention"),
        (
            {"growth": "daedal", "block_length": "canvas"},
            FULL,
            "set block_length to a number",
        ),
        (
            {"growth": "rho_eos", "sub_block_length": 8},
            FULL,
            "does not work with sub_block_length",
        ),
        ({"growth_config": {"initial": 32}}, FULL, "growth 'none'"),
        (
            {"growth": "rho_eos", "growth_config": {"window": 8}},
            FULL,
            "initial, expansion, threshold",
        ),
        (
            {"growth": "daedal", "growth_config": {"threshold": 0}},
            FULL,
            "growth_config",
        ),
        ({"eotp": "canvas"}, BLOCKS, "use 'off', 'block' or 'token'"),
    ],
)
def test_what_cannot_work_is_refused(options: dict, model: ModelDefaults, message: str):
    with pytest.raises(ValueError, match="(?s).*") as caught:
        resolve(DlmConfig(), {"dlm": options}, model)
    assert message in str(caught.value)
