# SPDX-License-Identifier: Apache-2.0
"""The second phase of llada-tiny's training, from weights that are there."""

from pathlib import Path

import pytest
import torch

from vllm_dlm.config.aliases import resolve
from vllm_dlm.training.loop import LoopOptions
from vllm_dlm.training.tiny import llada_tiny
from vllm_dlm.training.tiny.export import export
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape, load_llada

# The first six steps are the first phase's, the last one is the second's.
OPTIONS = LoopOptions(steps=2, compile_model=False)


def test_the_second_phase_begins_with_the_weights_of_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name, smaller in (
        *(("BATCH_TOKENS", 768), ("NUM_PROGRESS_PROBLEMS", 4)),
        *(("NUM_LONG_PROBLEMS", 2), ("LONG_CANVAS", 32)),
    ):
        monkeypatch.setattr(llada_tiny, name, smaller)
    start = resolve("llada-tiny")
    assert llada_tiny.train(tmp_path, OPTIONS, start)
    before, after = load_llada(start), load_llada(tmp_path)
    assert after.shape.max_sequence_length == llada_tiny.LONGEST_ROW
    changes = [
        (old - new).abs().max().item()
        for old, new in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert 0 < max(changes) < 0.1
    # A checkpoint goes before: no step is left.
    assert llada_tiny.train(tmp_path, OPTIONS, start)
    again = load_llada(tmp_path)
    for old, new in zip(after.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_start_of_other_sizes_is_refused(tmp_path: Path):
    export(LLaDAModel(LLaDAShape(vocab_size=128, n_layers=1)), tmp_path / "start")
    with pytest.raises(ValueError, match="start: it has no tensor"):
        llada_tiny.train(tmp_path / "out", OPTIONS, tmp_path / "start")
