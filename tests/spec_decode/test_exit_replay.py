# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.exit_replay` counts the rounds that the oracle of DEL has."""

from __future__ import annotations

from pathlib import Path

import pytest
from spec_decode.del_reference import Oracle
from spec_decode.harness import fade, ragged_prompts, write_llama
from transformers import LlamaForCausalLM

from benchmarks import exit_replay
from benchmarks.exit_replay import STOPS, Network, Recording, play, record, table

NUM_LAYERS, MAX_TOKENS = 4, 14
PROMPTS = ragged_prompts(5)[1::3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(
        tmp_path_factory.mktemp("shallow"), seed=2, num_layers=NUM_LAYERS
    )
    network = fade(LlamaForCausalLM.from_pretrained(folder))
    # Texts run to the end of max_tokens, as the oracle's do.
    network.generation_config.eos_token_id = network.config.eos_token_id = None
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(folder: Path) -> list[Recording]:
    network = Network(folder)
    return [record(network, prompt, MAX_TOKENS) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_rounds_are_the_oracles(folder: Path, recordings: list[Recording], stop: str):
    counts = play(
        recordings,
        stop,
        shared=False,
        num_layers=NUM_LAYERS,
        max_tokens=MAX_TOKENS,
    )
    oracle = Oracle(folder, list(range(1, NUM_LAYERS)), NUM_LAYERS, stop)
    for (tokens, forwards, layers), prompt in zip(counts, PROMPTS, strict=True):
        rounds = oracle.rounds(prompt, MAX_TOKENS)
        assert tokens == MAX_TOKENS
        # The prompt's forward comes before the rounds, and a last token without a
        # draft is no round of the oracle.
        assert forwards - 1 - len(rounds) in (0, 1)
        assert layers == sum(exit * len(draft) for _, exit, _, draft in rounds)
    assert layers > 0


def test_table(recordings: list[Recording], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exit_replay, "RESAMPLINGS", 20)
    lines = table(recordings, NUM_LAYERS).splitlines()
    assert len(lines) == 2 + 2 * len(STOPS)
    assert len({line.count("|") for line in lines}) == 1
