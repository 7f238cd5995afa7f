# SPDX-License-Identifier: Apache-2.0
"""How many steps a search gives to the blocks of a diffusion model."""

from __future__ import annotations

from typing import Any

import pytest
from search.table_model import TableModel, table

from vllm_dlm import search
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.search.adapter import BlockPace
from vllm_dlm.search.base import Text


def defaults(**declared: Any) -> ModelDefaults:
    return ModelDefaults(strategy="static", block_length=8, mask_token_id=1, **declared)


def pace(model: ModelDefaults, dlm: Any = None, **server: Any) -> BlockPace:
    config = DlmConfig.from_mapping(server, where="test")
    return BlockPace(config, {"dlm": dlm or {}}, model, 4096)


def plan(pace: BlockPace, written: int, blocks: int = 1, prompt: int = 5) -> Any:
    text = Text((2,) * prompt, (3,) * written)
    return pace.plan(text, search.Step(blocks=blocks), 30)


def test_steps_with_full_attention():
    """The rest of the canvas is asked for, and cut where a block ends."""
    steps = pace(defaults())
    found = [plan(steps, 0), plan(steps, 8, blocks=2), plan(steps, 24)]
    assert [(each.max_tokens, each.keep) for each in found] == [
        (30, 8),
        (22, 16),
        (6, 6),
    ]


def test_steps_of_block_causal_models():
    """To the end of a block, from wherever they are counted."""
    from_start = pace(defaults(attention="block", block_origin="start"))
    assert [plan(from_start, n).max_tokens for n in (0, 3, 11, 27)] == [3, 8, 8, 3]
    from_prompt = pace(defaults(attention="block"))
    assert [plan(from_prompt, n).max_tokens for n in (0, 8, 24)] == [8, 8, 6]
    assert plan(from_prompt, 0).keep is None


def test_the_servers_steps_are_given_to_blocks():
    steps = pace(defaults(), steps=16)
    # 30 tokens take four blocks.
    assert plan(steps, 0).options == {"steps_per_block": 4}
    assert plan(steps, 24).options == {"steps_per_block": 4}
    assert plan(pace(defaults()), 0).options is None


@pytest.mark.parametrize(
    ("dlm", "message"),
    [
        ({"steps": 8}, "set steps_per_block; or write whole texts"),
        ({"cache": "dual"}, "cache 'dual' would refresh elsewhere"),
        ({"eotp": "block"}, "set eotp to 'off'"),
        ({"growth": "daedal"}, "set growth to 'none'"),
        ({"strategy": "ass"}, "'ass' decides more than a block"),
    ],
)
def test_what_looks_beyond_a_block(dlm: Any, message: str):
    with pytest.raises(ValueError, match=message):
        plan(pace(defaults(), dlm), 0)


def test_a_second_canvas():
    with pytest.raises(ValueError, match="more than one canvas .of 16 positions"):
        plan(pace(defaults(), max_canvas=16), 0)


def test_steps_of_the_other_kind():
    with pytest.raises(ValueError, match="a step is a number of blocks"):
        pace(defaults()).plan(Text((1,)), search.Step(tokens=4), 30)
    with pytest.raises(ValueError, match="a step of blocks is for diffusion models"):
        TableModel(table({"": {"a": 0.5, "b": 0.5}})).pace.plan(
            Text((1,)), search.Step(blocks=1), 30
        )
