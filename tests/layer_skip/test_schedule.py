# SPDX-License-Identifier: Apache-2.0
"""Which layers are kept: the published rule, and what config.json may say."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from vllm_dlm.layer_skip.schedule import read_schedule, reserved_layers


@pytest.mark.parametrize(
    ("num_layers", "speedup", "reserved"),
    [
        (30, 5, [0, 6, 12, 18, 24, 29]),
        (32, 3, [0, 3, 6, 9, 12, 15, 18, 21, 24, 31]),
        (24, 2, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23]),
        (12, 3, [0, 4, 8, 11]),
        (8, 2, [0, 2, 4, 7]),
        (8, 4, [0, 7]),
        (3, 1, [0, 1, 2]),
        (2, 1, [0, 1]),
    ],
)
def test_the_published_rule(num_layers: int, speedup: float, reserved: list[int]):
    assert reserved_layers(num_layers, speedup) == reserved


@pytest.mark.parametrize("num_layers", range(2, 100))
def test_the_rule_as_it_is_written(num_layers: int):
    """Layer by layer, as in the published code."""
    for speedup in (1, 1.5, 2, 3, 5, 10):
        count = int(num_layers / speedup)
        if count < 2:
            with pytest.raises(ValueError, match="two are kept at least"):
                reserved_layers(num_layers, speedup)
            continue
        step, kept = int(num_layers / (count - 1)), {0, num_layers - 1}
        for layer in range(1, num_layers - 1):
            if layer % step == 0 and len(kept) < count:
                kept.add(layer)
        assert reserved_layers(num_layers, speedup) == sorted(kept)


def config(said: Any) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=8, layer_skip=said)


def test_what_config_json_may_say():
    assert read_schedule(config({"speedup": 2})) == [0, 2, 4, 7]
    assert read_schedule(config({"reserved": [1, 5]})) == [1, 5]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "layer_skip must be"),
        ({}, "layer_skip must be"),
        ({"speedup": 2, "reserved": [0]}, "layer_skip must be"),
        ({"speed_up": 2}, "Did you mean 'speedup'"),
        ({"speedup": "2"}, "must be a number, not '2'"),
        ({"speedup": True}, "must be a number"),
        ({"speedup": 0.5}, "from 1 to 4 with 8 layers"),
        ({"speedup": float("nan")}, "from 1 to 4"),
        ({"reserved": []}, "ascending layers"),
        ({"reserved": [2, 1]}, "ascending layers"),
        ({"reserved": [1, 1]}, "ascending layers"),
        ({"reserved": [True]}, "ascending layers"),
        ({"reserved": 3}, "ascending layers"),
        ({"reserved": [0, 8]}, "of the layers 0 to 7"),
        ({"reserved": [-1, 3]}, "of the layers 0 to 7"),
    ],
)
def test_what_it_may_not_say(said: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read_schedule(config(said))


def test_no_schedule_at_all():
    with pytest.raises(ValueError, match="train layer-skip"):
        read_schedule(LlamaConfig())
