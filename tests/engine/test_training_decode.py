# SPDX-License-Identifier: Apache-2.0
"""A training's own decoding is an engine's: the same tokens, in as many forwards."""

from pathlib import Path

import pytest
from engine.harness import Engine, params

PROMPTS = [[1, 20, 21, 22], [1, 9], [1, *range(30, 43)], [1, 7, 8, 7, 8]]
OPTIONS = {
    "static": {"strategy": "static", "block_length": 8},
    "static, 3 steps": {"strategy": "static", "steps_per_block": 3, "block_length": 8},
    "static, a budget": {"strategy": "static", "steps": 8, "block_length": 16},
    "threshold": {"strategy": "threshold", "strategy_config": {"threshold": 0.3}},
    "entropy": {"strategy": "entropy", "strategy_config": {"threshold": 0.8}},
    "ass": {"strategy": "ass"},
    "eoser": {"strategy": "eoser"},
    "cad": {"strategy": "cad", "block_length": 8},
    "joint": {"strategy": "joint", "block_length": 8},
    "saber": {"strategy": "saber", "block_length": 8},
    "klass": {"strategy": "klass", "block_length": 8},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_and_forwards(engine: Engine, checkpoint: Path, name: str):
    from vllm_dlm.training.decoding import decode
    from vllm_dlm.training.learner import load_learner

    options, canvas = OPTIONS[name], 32
    learner = load_learner(checkpoint)
    try:
        ours = decode(learner, PROMPTS, options, canvas)
    except ValueError as error:
        assert name == "klass" and "takes an engine" in str(error)
        return
    served = engine.run(PROMPTS, params(canvas, dlm=options))
    found = [(one.tokens, one.forwards) for one in served]
    assert [tuple(each) for each in ours] == found


def test_what_takes_an_engine_is_refused(checkpoint: Path):
    from vllm_dlm.training.decoding import decode
    from vllm_dlm.training.learner import load_learner

    learner = load_learner(checkpoint)
    for options in (
        {"cache": "dual"},
        {"strategy": "lopa"},
        {"eotp": "block"},
        {"growth": "daedal"},
    ):
        with pytest.raises(ValueError, match="takes an engine"):
            decode(learner, PROMPTS, options, 32)
    with pytest.raises(ValueError, match="entropi"):
        decode(learner, PROMPTS, {"strategy": "entropi"}, 32)
