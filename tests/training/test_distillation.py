# SPDX-License-Identifier: Apache-2.0
"""Certainty forcing, consistency distillation and pseudo-trajectories as commands."""

import json

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import split_rows, task_rows

torch = pytest.importorskip("torch")

from training.distillation_cases import (  # noqa: E402
    END,
    MASK,
    training_of,
    write_rows,
)

from vllm_dlm.training.recipes import (  # noqa: E402
    certainty,
    dscd,
    self_made,
)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        (certainty, ("--block-length", "16", "--full-mask", "0.3")),
        (dscd, ("--short-caps", "off")),
        (dscd, ("--lora-rank", "2", "--clamp", "token")),
    ],
)
def test_a_batch_s_loss_is_that_of_its_rows_alone(tmp_path, recipe, more):
    training = training_of(tmp_path, recipe, "--batch-size", "6", *more)
    training.learner.network.eval()
    batch = training.batch(1)
    assert len(set(batch.prompt_lengths.tolist())) > 1
    made = recipe.RECIPE
    example = made.corrupt(training, batch, training.generator(1), 1)
    whole = made.step_loss(training, example, 1)
    for parts in (2, 6):
        alone = sum(
            made.step_loss(training, part, 1) for part in split_rows(example, 6, parts)
        )
        torch.testing.assert_close(alone, whole)
    # Nor does it matter what lies behind a row.
    example.inputs[
        ~batch.valid.view(6, *[1] * (example.inputs.dim() - 2), -1).expand_as(
            example.inputs
        )
    ] = 77
    torch.testing.assert_close(made.step_loss(training, example, 1), whole)


def options_of(recipe, folder, data, output, *more):
    return [
        *("train", recipe, str(folder), "--output-dir", str(output)),
        *("--steps", "3", "--batch-size", "4", "--data", str(data)),
        *("--num-problems", "0", *more),
    ]


def test_a_block_causal_model_learns_to_be_certain(tmp_path):
    from training.tiny_learner import tiny_folder

    folder = tiny_folder(tmp_path / "model", "sdar")
    data = write_rows(tmp_path / "rows.jsonl")
    assert main(options_of("certainty", folder, data, tmp_path / "out")) == 0


@pytest.mark.parametrize("recipe", ["certainty", "dscd", "d3llm"])
def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, recipe):
    from training.tiny_learner import tiny_folder

    from vllm_dlm.files.model_folders import read_weights

    folder = tiny_folder(tmp_path / "model")
    if recipe == "d3llm":
        data = tmp_path / "trajectories-1.jsonl"
        with data.open("w") as file:
            for number, row in enumerate(task_rows(20, 3)):
                first = {"request": str(number), "prompt": row.prompt_ids, "mask": MASK}
                writes = [list(pair) for pair in enumerate(row.response_ids)]
                block = {"request": str(number), "block": [0, len(writes)]}
                file.write(json.dumps(first) + "\n")
                for step, write in enumerate(writes[::-1]):
                    line = block | {"step": step, "writes": [write]}
                    file.write(json.dumps(line) + "\n")
    else:
        data = write_rows(tmp_path / "rows.jsonl")
    assert main(options_of(recipe, folder, data, tmp_path / "whole")) == 0
    stopped = options_of(recipe, folder, data, tmp_path / "parts")
    for _ in range(3):  # each run stops after one step
        assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    before, whole, parts = (
        read_weights(tmp_path / name / "model.safetensors")
        for name in ("model", "whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("certainty", ("--mask-ratio", "0.9", "0.1"), "expected 0 <= LOW <= HIGH <= 1"),
        ("certainty", ("--full-mask", "2"), "--full-mask is at least 0 and at most 1"),
        ("certainty", ("--beta", "-1"), "--beta is at least 0, not -1"),
        ("certainty", ("--certainty-temperature", "0"), "is at least 0.001"),
        ("d3llm", ("--padding-weight", "-1"), "--padding-weight is at least 0"),
        ("dscd", ("--threshold", "3"), "--threshold is at least"),
        ("certainty", ("--rounds", "2"), "--rounds is for data that the network makes"),
        ("certainty", ("--free-share", "0.5"), "--free-share is for data that"),
        ("certainty", ("--rounds", "4"), "--rounds 4 are more than the 3 steps"),
        ("sdar certainty", ("--block-length", "8"), "has blocks of 4 tokens"),
        ("sdar dscd", (), "is block-causal"),
        ("sdar d3llm", (), "is block-causal"),
    ],
)
def test_refusals(tmp_path, capsys, recipe, more, message):
    from training.tiny_learner import tiny_folder

    data = write_rows(tmp_path / "rows.jsonl")
    *layout, recipe = recipe.split()
    folder = tiny_folder(tmp_path / "model", *layout)
    assert main(options_of(recipe, folder, data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_the_network_makes_its_own_data(tmp_path, monkeypatch):
    import argparse

    from vllm_dlm.training.answer_log import read_answers
    from vllm_dlm.training.learner import load_learner
    from vllm_dlm.training.reinforcement.rollouts import Decoder

    monkeypatch.setattr(self_made, "_BATCH", 16)
    learner = load_learner("llada-tiny")
    args = argparse.Namespace(
        model="llada-tiny",
        output_dir=tmp_path,
        num_rows=20,
        seed=1,
        free_share=0.5,
        canvas_length=None,
        resume=True,
        data=None,
    )
    decoder = Decoder("threshold", {"threshold": 0.9})
    answers = self_made.own_answers(args, learner, decoder)
    assert 14 < len(answers) <= 20
    assert all(answer.response_ids[-1] == END for answer in answers)
    assert all(len(a.steps) == len(a.response_ids) for a in answers)
    # A run that goes on takes them from the file, the lost part is made again.
    file = tmp_path / "answers-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 21
    file.write_text("".join(lines[:18]) + lines[18][:9])
    assert self_made.own_answers(args, learner, decoder) == answers
    assert learner.network.training
    with pytest.raises(ValueError, match="they were made with other options"):
        read_answers(file, {"seed": 2})
    args.num_rows = 21
    with pytest.raises(ValueError, match="they were made with other options"):
        self_made.own_answers(args, learner, decoder)
