# SPDX-License-Identifier: Apache-2.0
"""Rows and training of llada-tiny-t2t, and what the strategy joint makes of them."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_dlm.files.model_folders import Config
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import FREE_TASKS, sample_problems
from vllm_dlm.training.decoding import decode
from vllm_dlm.training.learner import load_learner
from vllm_dlm.training.loop import LoopOptions
from vllm_dlm.training.tiny import edit_data, llada_tiny_t2t
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape, load_llada

MASK = tokenizer.MASK_ID
OPTIONS = LoopOptions(steps=3, compile_model=False, eval_steps=50)


@pytest.fixture(scope="module")
def network() -> LLaDAModel:
    torch.manual_seed(0)
    shape = LLaDAShape(
        vocab_size=tokenizer.VOCAB_SIZE,
        d_model=32,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=48,
    )
    return LLaDAModel(shape)


def test_batches_depend_on_seed_step_and_network_alone(network: LLaDAModel):
    for step in range(4):
        masks, edits = edit_data.make_batches(network, step, 1)
        for batch, again in zip(
            (masks, edits), edit_data.make_batches(network, step, 1), strict=True
        ):
            assert torch.equal(batch.inputs, again.inputs)
            assert torch.equal(batch.ids, again.ids)
            assert torch.equal(batch.weights, again.weights)
        assert masks.weights.sum() == pytest.approx(edit_data.MASK_SHARE)
        assert edits.weights.sum() == pytest.approx(1 - edit_data.MASK_SHARE)
    other = edit_data.make_batches(network, 0, 2)[1]
    assert not torch.equal(
        other.ids[:5, :40], edit_data.make_batches(network, 0, 1)[1].ids[:5, :40]
    )


def test_targets_are_right_answers_to_questions_that_are_left_as_they_are(
    network: LLaDAModel,
):
    for seed in range(4):
        rng = random.Random(seed)
        edits = edit_data.edit_batch(network, rng, 20, 64)
        rows = edit_data.draw_rows(random.Random(seed), 20, 64)
        for row, problem in enumerate(rows.problems):
            start = rows.starts[row]
            assert torch.equal(edits.inputs[row, :start], rows.ids[row, :start])
            assert torch.equal(edits.ids[row, :start], rows.ids[row, :start])
            assert problem.check(tokenizer.decode(edits.ids[row, start:].tolist()))
        assert (edits.weights[~rows.in_canvas] == 0).all()
        kept = edits.inputs == edits.ids
        counted = edits.weights[rows.in_answer]
        expected = torch.where(kept, edit_data.KEPT_WEIGHT, 1.0)[rows.in_answer]
        torch.testing.assert_close(counted, expected)
        wrong = ~kept & (edits.inputs != MASK) & rows.in_answer
        assert wrong.sum() > 20


def test_a_batch_may_have_no_row_that_the_model_edits(
    network: LLaDAModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(edit_data, "EDITED", 0.0)
    assert edit_data.edit_batch(network, random.Random(1), 4, 64).weights.any()


def test_what_is_written_are_the_network_s_own_tokens(network: LLaDAModel):
    """With nothing drawn and no threshold, every mask becomes the best token."""
    rows = edit_data.draw_rows(random.Random(1), 8, 48)
    inputs = rows.ids.masked_fill(rows.in_canvas, MASK)
    begun = torch.arange(48) < torch.tensor(rows.starts)[:, None] + 32
    written = edit_data.write(
        network,
        inputs,
        begun,
        torch.zeros(8, 1),
        torch.zeros(8, 1, dtype=torch.bool),
        torch.Generator().manual_seed(0),
    )
    probabilities, best = edit_data.best_tokens(network, inputs)
    expected = torch.where(rows.in_canvas & begun, best, inputs)
    assert torch.equal(written, expected)
    assert (best != MASK).all()
    # Half of the rows: only what is surer than the row's middle.
    threshold = probabilities.amax(-1).median(1, keepdim=True).values
    threshold[::2] = 0.0
    some = edit_data.write(
        network,
        inputs,
        begun,
        threshold,
        torch.ones(8, 1, dtype=torch.bool),
        torch.Generator().manual_seed(0),
    )
    is_written = (inputs == MASK) & (some != MASK)
    sure = probabilities.amax(-1) >= threshold
    assert torch.equal(is_written, rows.in_canvas & begun & sure)
    assert (some[is_written] != best[is_written]).any()
    _, again = edit_data.best_tokens(network, written)
    edited = edit_data.edit(network, written, rows.in_canvas)
    expected = torch.where(rows.in_canvas & (written != MASK), again, written)
    assert torch.equal(edited, expected)


@pytest.mark.slow  # test_t2t.py has it of a smaller model.
def test_an_interrupted_training_ends_at_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(llada_tiny_t2t, "NUM_PROGRESS_PROBLEMS", 4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert llada_tiny_t2t.train(whole, OPTIONS)
    stopping = replace(OPTIONS, max_minutes=1e-9)
    done = [llada_tiny_t2t.train(parts, stopping) for _ in range(3)]
    assert done == [False, False, True]
    one, other = load_llada(whole).state_dict(), load_llada(parts).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    values = Config(whole).values
    assert values["dlm_options"] == llada_tiny_t2t.DECODING
    assert values["dlm_max_canvas"] == llada_tiny_t2t.MAX_CANVAS


@pytest.mark.slow  # Of weights that do not change.
def test_the_shipped_model_edits_better_than_llada_tiny_waits():
    """Of as many forwards or fewer, where several answers are right."""
    problems = sample_problems(24, 7, "heldout", FREE_TASKS)
    prompts = [tokenizer.encode_prompt(problem.question, True) for problem in problems]

    def measure(model: str, **options: Any) -> tuple[float, float]:
        answers = decode(load_learner(model), prompts, options, canvas=32)
        rights = [
            problem.check(tokenizer.decode(answer.tokens))
            for problem, answer in zip(problems, answers, strict=True)
        ]
        forwards = sum(answer.forwards for answer in answers)
        return forwards / len(problems), sum(rights) / len(problems)

    joint = {"mask_threshold": 0.0, "edit_threshold": 0.0, "max_post_steps": 2}
    edited = measure("llada-tiny-t2t", strategy="joint", strategy_config=joint)
    waited = measure(
        "llada-tiny", strategy="threshold", strategy_config={"threshold": 0.6}
    )
    assert edited[0] <= min(3, waited[0])
    assert edited[1] >= 0.75 > waited[1]
