# SPDX-License-Identifier: Apache-2.0
"""Reinforcement learning as a command: runs, what they measure, what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from training.tiny_learner import (  # noqa: E402
    largest_difference,
    tiny_folder,
    weights_of,
)

from vllm_dlm.cli.command import main  # noqa: E402
from vllm_dlm.training.recipes import (  # noqa: E402
    cj_grpo,
    command,
    coupled_grpo,
    trace_rl,
)
from vllm_dlm.training.reinforcement import loop  # noqa: E402
from vllm_dlm.training.reinforcement.questions import read_questions, task_questions  # noqa: E402

RECIPES = {"cj-grpo": cj_grpo, "coupled-grpo": coupled_grpo, "tracerl": trace_rl}

REWARD = """
def varied(prompts, texts, records):
    return [len(text) + 0.1 * text.count("a") for text in texts]

def equal(prompts, texts, records):
    return [1.0 for text in texts]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return tiny_folder(folder)


def options_of(name: str, folder: Path, output: Path, *more: str) -> list[str]:
    return [
        *("train", name, str(folder), "--output-dir", str(output)),
        *("--steps", "2", "--batch-size", "2", "--generations", "3"),
        *("--canvas-length", "6", "--num-rows", "20", "--held-out", "0"),
        *("--num-problems", "0"),
        *("--reward", f"{folder / 'reward.py'}:varied", *more),
    ]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cj-grpo", ("--inner-updates", "2", "--beta", "0.1")),
        pytest.param(
            "coupled-grpo",
            ("--inner-updates", "2", "--lora-rank", "2", "--beta", ".1"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tracerl",
            ("--shrink", "2", "--decoder", "threshold"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_run_ends_at_the_same_bits(
    folder: Path, tmp_path: Path, name: str, more: tuple[str, ...]
):
    assert main(options_of(name, folder, tmp_path / "whole", *more)) == 0
    for _ in range(2):
        stopped = options_of(name, folder, tmp_path / "parts", *more)
        assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert largest_difference(whole, weights_of(folder)) > 1e-5


@pytest.mark.parametrize(
    "name", ["cj-grpo", pytest.param("coupled-grpo", marks=pytest.mark.slow)]
)
def test_parts_of_a_step_add_up(folder: Path, tmp_path: Path, name: str):
    """--accumulate and --rollout-rows need less memory, and change nothing."""
    found = []
    for parts, rows in (("1", "6"), ("4", "5")):
        output = tmp_path / parts
        more = ("--accumulate", parts, "--rollout-rows", rows)
        assert main(options_of(name, folder, output, *more)) == 0
        found.append(weights_of(output))
    assert largest_difference(found[0], weights_of(folder)) > 1e-4
    assert largest_difference(*found) < 1e-5


def make(
    name: str, folder: Path, *more: str, layout: str = "llada"
) -> tuple[loop.Method, command.Training]:
    recipe = RECIPES[name].RECIPE
    parser = argparse.ArgumentParser()
    recipe.add_options(parser)
    _, _, *options = options_of(name, folder, folder / "out", *more)
    training = command.start(recipe, parser.parse_args(options))
    method = recipe.updates.__closure__[0].cell_contents
    assert isinstance(method, loop.Method)
    return method, training


def test_what_a_step_measures(folder: Path):
    _, training = make("cj-grpo", folder, "--held-out", "2", "--measure-steps", "2")
    (measures,) = cj_grpo.RECIPE.updates(training, 0)
    (at_one,) = cj_grpo.RECIPE.updates(training, 1)
    assert measures["equal groups"] == 0 and measures["forwards"] == 2
    assert measures["reward"] > 0
    assert 0 < measures["first entropy"] < torch.tensor(128.0).log()
    held_out = loop.measure(training)
    assert {"reward, static 4", "forwards, threshold .9"} <= held_out.keys()
    assert held_out.keys() == measures.keys() - at_one.keys()
    assert held_out["forwards, static 4"] <= 2
    # Held-out questions are none of those that are trained on.
    known = {question.prompt for question in training.rows}
    assert not known & {question.prompt for question in training.rows.held_out}


def test_equal_groups_teach_nothing(folder: Path, tmp_path: Path):
    options = options_of("cj-grpo", folder, tmp_path, "--weight-decay", "0.1")
    reward = options.index("--reward") + 1
    options[reward] = options[reward].replace("varied", "equal")
    assert main(options) == 0
    assert largest_difference(weights_of(tmp_path), weights_of(folder)) == 0


@pytest.mark.parametrize("adapter", [(), ("--lora-rank", "2")])
def test_the_reference_stays_what_the_model_was(folder: Path, adapter):
    """With an adapter and without one."""
    method, training = make("coupled-grpo", folder, "--beta", "0.1", *adapter)
    ids = torch.randint(3, 100, (2, 9))
    asked = (ids, torch.ones_like(ids, dtype=torch.bool), ids > 50)
    with torch.no_grad():
        before = training.learner.logits_at(*asked)
        for parameter in training.learner.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        after = training.learner.logits_at(*asked)
        with loop._reference(method, training)() as logits_at:
            reference = logits_at(*asked)
    torch.testing.assert_close(reference, before)
    assert (after - before).abs().max() > 0.01


def test_a_block_causal_model(tmp_path: Path):
    folder = tiny_folder(tmp_path / "sdar", "sdar", block_length=4)
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    more = ("--block-length", "4", "--tokens-per-step", "2")
    assert main(options_of("tracerl", folder, tmp_path / "out", *more)) == 0
    found = weights_of(tmp_path / "out")
    assert largest_difference(found, weights_of(folder)) > 1e-5


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--generations", "1"), "2 or more"),
        (("--temperature", "0"), "above 0"),
        (("--decoder", "ass", "--tokens-per-step", "2"), "leave tokens_per_step out"),
        (("--row-length", "20"), "--canvas-length"),
        (("--tasks", "shufle"), "shuffle"),
        (("--reward", "exakt"), "exact"),
        (("--beta", "-1"), "below 0"),
        (("--prompt-length", "9"), "prompts of --data"),
        (("--decoder-config", '{"mode": "random"}'), "uniform"),
    ],
)
def test_options_that_cannot_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more, words: str
):
    assert main(options_of("cj-grpo", folder, tmp_path, *more)) == 2
    assert words in capsys.readouterr().err


def test_questions_of_a_file(folder: Path, tmp_path: Path, capsys):
    from vllm_dlm.training.drafters.teacher import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    lines = [
        {"prompt": "Reverse [Ada, Ben]", "answer": "[Ben, Ada]"},
        {"prompt_ids": [1, 30, 31], "answer": "x"},
        {"messages": [{"role": "user", "content": "Add 1+1"}], "answer": "2"},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = read_questions(file, tokenizer)
    assert [question.record for question in found] == lines
    assert found[0].prompt == "Reverse [Ada, Ben]" and found[2].prompt == "Add 1+1"
    assert found[0].prompt_ids == tokenizer.encode("Reverse [Ada, Ben]")
    assert tokenizer.decode(found[2].prompt_ids).count("user") == 1
    cut = read_questions(file, tokenizer, prompt_length=2)
    assert [q.prompt_ids for q in cut] == [q.prompt_ids[-2:] for q in found]
    more = ("--data", str(file), "--reward", "exact")
    assert main([*options_of("cj-grpo", folder, tmp_path / "out", *more)]) == 0
    kept = ("--held-out", "3")
    assert main([*options_of("cj-grpo", folder, tmp_path / "o2", *more, *kept)]) == 2
    assert "leaves nothing to train on" in capsys.readouterr().err
    file.write_text('{"prompt": "x"}\n{"question": "y"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='line 2: expected the keys of one of .*"prom'):
        read_questions(file, tokenizer)


def test_built_in_questions():
    questions = task_questions(40, 3, ["insert_any"])
    assert questions == task_questions(40, 3, ["insert_any"])
    assert {question.record["task"] for question in questions} == {"insert_any"}
    held_out = task_questions(40, 3, ["insert_any"], "heldout")
    assert not {q.prompt for q in questions} & {q.prompt for q in held_out}
    assert dataclasses.is_dataclass(questions[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("cj-grpo", 0.55), ("coupled-grpo", 0.7)])
def test_llada_tiny_learns_four_questions(tmp_path: Path, name: str, least: float):
    """Reward of answers drawn four tokens at a time: .17 at first, .75 and 1 were seen
    after nine and six steps."""
    recipe = RECIPES[name].RECIPE
    rewards = []

    def updates(training: command.Training, step: int):
        for measures in recipe.updates(training, step):
            rewards.append(measures["reward"])
            yield measures

    parser = argparse.ArgumentParser()
    recipe.add_options(parser)
    options = [
        *("llada-tiny", "--output-dir", str(tmp_path), "--steps", "15"),
        *("--tasks", "insert_any,replace_any", "--num-rows", "4"),
        *("--batch-size", "4", "--generations", "12", "--canvas-length", "16"),
        *("--learning-rate", "1e-3", "--held-out", "0", "--threads", "1"),
    ]
    args = parser.parse_args(options)
    command.train(dataclasses.replace(recipe, updates=updates), args)
    assert len(rewards) == 15 and rewards[0] < 0.35
    assert sum(rewards[-4:]) / 4 >= least
