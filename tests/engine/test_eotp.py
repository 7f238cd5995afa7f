# SPDX-License-Identifier: Apache-2.0
"""End-of-text prediction with other strategies than learn2pd, and other models.

That tokens and forwards are the oracle's shows `test_parity.py` (`threshold/token`,
`localleap/block`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine.block_engines import BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, Finished, params

LENGTHS = range(1, 25)


def decode(
    engine: Engine, eotp: str, strategy: str = "threshold", **config: Any
) -> list[Finished]:
    """Requests whose end of text is believed at the slightest sign."""
    dlm = {
        "strategy": strategy,
        "strategy_config": config,
        "block_length": 16,
        "eotp": eotp,
        "eotp_threshold": 0.02,
    }
    prompts = [make_prompt(length, 1) for length in LENGTHS]
    return engine.run(prompts, params(64, dlm=dlm))


def shared(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (one, other)))
    )


@pytest.fixture(scope="module", params=["SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B"])
def block_engine(
    request: pytest.FixtureRequest, engines: Callable[..., Engine], tmp_path_factory
) -> Engine:
    folder = tmp_path_factory.getbasetemp()
    return BlockEngines(engines, folder, request.param)()


def test_block_causal_models_see_no_padding_to_drop(block_engine: Engine):
    """A cut at a block's end changes nothing: they never see what is right of it."""
    assert decode(block_engine, "block") == decode(block_engine, "off")


def test_a_token_cut_ends_the_text_of_block_causal_models(block_engine: Engine):
    off, token = decode(block_engine, "off"), decode(block_engine, "token")
    earlier = 0
    for length, one, other in zip(LENGTHS, off, token, strict=True):
        assert other.output.finish_reason in ("stop", "length")
        assert len(other.tokens) == 64 or other.output.finish_reason == "stop"
        if other.tokens == one.tokens:
            continue
        earlier += 1
        # Blocks before the one that was cut are the same.
        cut_block = (length + len(other.tokens) - 1) // 16
        assert shared(one.tokens, other.tokens) >= cut_block * 16 - length
    assert earlier >= 2


def test_where_tokens_may_change_a_block_is_kept_whole(engine: Engine):
    config = {"strategy": "hierarchy", "remask": True}
    token, block = decode(engine, "token", **config), decode(engine, "block", **config)
    assert token == block
    assert token != decode(engine, "off", **config)


def test_cad_holds_ends_of_text_back(engine: Engine):
    config = {"strategy": "cad", "threshold": 0.5, "most": 2}
    free = decode(engine, "off", **config)
    held = decode(engine, "off", **config, release_end=1.0)
    assert sum(len(result.tokens) < 64 for result in free) >= 8
    assert sum(len(result.tokens) for result in held) > 1.2 * sum(
        len(result.tokens) for result in free
    )
