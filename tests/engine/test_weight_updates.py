# SPDX-License-Identifier: Apache-2.0
"""New weights in a running engine, and roll-outs that follow a training.

The engine that other tests share is updated, and gets its weights back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine.block_engines import BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, params

from vllm_dlm.training.learner import Learner, load_learner
from vllm_dlm.training.reinforcement.engine_rollouts import EngineRoller
from vllm_dlm.training.reinforcement.policy import token_log_probabilities
from vllm_dlm.training.reinforcement.rollout_rows import RollOuts
from vllm_dlm.training.reinforcement.rollouts import Decoder, roll_out

CANVAS = 20
PROMPTS = [make_prompt(length) for length in (5, 12, 9, 30)]
DECODERS = {
    "static": Decoder("static", tokens_per_step=3),
    "blocks": Decoder("static", block_length=5, tokens_per_step=2),
    "ass": Decoder("ass"),
    "eoser": Decoder("eoser", tokens_per_step=2),
    "eoser-ass": Decoder("eoser-ass"),
    "threshold": Decoder("threshold", {"threshold": 0.3}),
}


def give_back(engine: Engine, folder: Path) -> None:
    """The weights that the engine was started with."""
    engine.llm.init_weight_transfer_engine({"init_info": {}})
    engine.llm.start_weight_update()
    engine.llm.update_weights({"update_info": {"path": str(folder)}})
    engine.llm.finish_weight_update()
    assert engine.llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def updated(engine: Engine, checkpoint: Path) -> Iterator[Engine]:
    yield engine
    give_back(engine, checkpoint)


@pytest.fixture
def learner(checkpoint: Path) -> Learner:
    return load_learner(checkpoint)


def change(learner: Learner, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)


def in_the_trainer(learner: Learner, decoder: Decoder) -> RollOuts:
    learner.network.eval()
    return roll_out(
        learner.logits_at,
        PROMPTS,
        canvas=CANVAS,
        decoder=decoder,
        mask_id=learner.mask_id,
        end_id=learner.end_id,
        seeds=[0] * len(PROMPTS),
        attention_block=learner.attention_block,
        stop_at_end=decoder.asks_for_ends,
    )


def assert_same(one: RollOuts, other: RollOuts) -> None:
    for name in ("ids", "valid", "steps", "prompt_lengths"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_both_ways_roll_out_alike(updated: Engine, learner: Learner, name: str):
    """At temperature 0, before an update of the weights and after it."""
    decoder = DECODERS[name]
    roller = EngineRoller(updated.llm, learner, decoder, CANVAS)
    seen = []
    for seed in (None, 4):
        if seed is not None:
            change(learner, seed)
        found = roller(PROMPTS, [0] * len(PROMPTS))
        assert_same(found, in_the_trainer(learner, decoder))
        seen.append(found)
    assert not torch.equal(seen[0].ids, seen[1].ids)


def test_drawn_tokens_belong_to_their_canvases(updated: Engine, learner: Learner):
    """With noise the trainer finds each token's log-probability on its canvas."""
    decoder = Decoder("eoser", tokens_per_step=3, temperature=1.0)
    roller = EngineRoller(updated.llm, learner, decoder, CANVAS)
    change(learner, 5)
    found = roller(PROMPTS * 2, range(8))
    assert not torch.equal(found.ids[:4], found.ids[4:])
    learner.network.eval()
    for step in range(found.num_steps):
        where = found.written(step)
        with torch.no_grad():
            again = token_log_probabilities(
                learner.logits_at,
                found.canvas(step),
                found.valid,
                where,
                found.ids[where],
                learner.mask_id,
            )
        # What is behind a text comes in frames, whose numbers are rounded.
        torch.testing.assert_close(found.logprobs[where], again, atol=2e-3, rtol=0)


def test_weights_that_are_given_back_are_the_same(
    updated: Engine, learner: Learner, checkpoint: Path
):
    decoder = Decoder("static")
    roller = EngineRoller(updated.llm, learner, decoder, CANVAS)
    before = roller(PROMPTS, [0] * 4)
    change(learner, 6)
    assert not torch.equal(roller(PROMPTS, [0] * 4).logprobs, before.logprobs)
    give_back(updated, checkpoint)
    again = EngineRoller(updated.llm, load_learner(checkpoint), decoder, CANVAS)
    assert torch.equal(again(PROMPTS, [0] * 4).logprobs, before.logprobs)


def test_prefixes_are_forgotten(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
):
    """A block-causal model finds the keys of a prompt that it has seen; after an update
    they would be those of other weights."""
    model = BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")
    engine = model()
    learner = load_learner(model.folder)
    decoder = Decoder("static", block_length=16)
    roller = EngineRoller(engine.llm, learner, decoder, 16)
    prompt = make_prompt(100)

    def cached() -> int:
        (output,) = engine.outputs([prompt], params(4))
        return int(output.num_cached_tokens)

    try:
        change(learner, 7)
        roller.update()
        assert cached() == 0 < cached()
        roller.update()
        assert cached() == 0
    finally:
        give_back(engine, model.folder)


def test_a_path_without_weights(updated: Engine, tmp_path: Path):
    updated.llm.init_weight_transfer_engine({"init_info": {}})
    updated.llm.start_weight_update()
    with pytest.raises(ValueError, match="neither a file of safetensors"):
        updated.llm.update_weights({"update_info": {"path": str(tmp_path)}})
