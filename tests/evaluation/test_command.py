# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm eval` with engines: its cells, what it resumes, and what it prints."""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import pytest

from vllm_dlm.evaluation import command, runner
from vllm_dlm.evaluation.report import MEAN, plot, rows, with_means

WORK = ("llada-tiny", "--tasks", "tiny/copy,tiny/shuffle", "--limit", "12")
CELLS = ("--strategies", "static,threshold", "--tokens-per-step", "1,4")


def table_of(printed: str) -> list[str]:
    """The table of two cells."""
    lines = printed.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("task ")]
    return lines[first : first + 3]


def test_a_run_and_a_run_that_finds_all_done(evaluate, capsys):
    asked = ("llada-tiny", "--tasks", "tiny/copy", "--limit", "2")
    cells = evaluate(*asked, "--strategies", "static,threshold")
    assert [cell["setting"] for cell in cells] == [
        "static:tokens_per_step=1, none",
        "threshold, none",
    ]
    assert all(cell["accuracy"] == 1.0 for cell in cells)
    static, threshold = cells
    assert static["tokens"] == threshold["tokens"]
    assert static["forwards"] > threshold["forwards"]
    first = capsys.readouterr().out
    assert "AUP" in first and MEAN not in first
    # Nothing is left to ask, and so no engine starts.
    with mock.patch.object(runner, "started", side_effect=AssertionError):
        again = evaluate(*asked, "--strategies", "static,threshold", "--resume")
    assert again == cells
    assert table_of(capsys.readouterr().out) == table_of(first)


@pytest.mark.slow
def test_cells_of_two_tasks(evaluate, capsys: pytest.CaptureFixture[str]):
    cells = evaluate(*WORK, *CELLS)
    assert [(cell["task"], cell["setting"]) for cell in cells] == [
        (task, setting)
        for task in ("tiny/copy", "tiny/shuffle")
        for setting in (
            "static:tokens_per_step=1, none",
            "static:tokens_per_step=4, none",
            "threshold, none",
        )
    ]
    for cell in cells:
        assert cell["questions"] == 12 and 0 <= cell["accuracy"] <= 1
        assert cell["tokens"] / cell["forwards"] == cell["tokens_per_forward"]
        assert cell["tokens_per_second"] > 0
    of = {(cell["task"], cell["setting"]): cell for cell in cells}
    slow = of["tiny/copy", "static:tokens_per_step=1, none"]
    fast = of["tiny/copy", "static:tokens_per_step=4, none"]
    assert slow["accuracy"] > 0.9
    assert fast["forwards"] < slow["forwards"] / 2
    # Free orders do not go together as copies do.
    assert of["tiny/shuffle", "static:tokens_per_step=4, none"]["accuracy"] < 0.9
    table = capsys.readouterr().out
    assert "AUP" in table and MEAN in table
    # Two strategies more: nothing is asked again.
    again = evaluate(*WORK, "--strategies", "static,threshold,entropy", "--resume")
    assert again[: len(cells)] == cells
    assert {cell["setting"] for cell in again[len(cells) :]} == {"entropy, none"}


@pytest.mark.slow
def test_with_an_autoregressive_line(evaluate):
    cells = evaluate(*WORK, "--ar", "llama-tiny")
    ours, other = cells[0], cells[-1]
    assert (ours["engine"], other["engine"]) == ("vllm-dlm", "ar")
    assert other["setting"] == "autoregressive"
    assert other["tokens_per_forward"] == 1.0
    assert other["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "tiny", "--resume"], "name it with --json"),
        (["--tasks", "tiny", "--shots", "-1"], "--shots must be 0 or more"),
        (["--tasks", "tiny", "--tokens-per-step", "2"], "follow a schedule"),
        (["--tasks", "mbpp"], "--allow-code"),
        (["--tasks", "tiny", "--allow-code"], "--tasks names neither"),
        (["--tasks", "tiny", "--samples", "4"], "--samples is for tasks of lm-eval"),
        (["--tasks", "tiny", "--include-path", "."], "--include-path is for tasks"),
        (
            [
                "--tasks",
                "lm-eval:x",
                "--strategies",
                "static",
                "--tokens-per-step",
                "2",
            ],
            "no schedule of their own",
        ),
    ],
)
def test_refused_before_an_engine_starts(arguments: list[str], message: str):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["llada-tiny", *arguments])
    with pytest.raises(ValueError, match=message):
        command.run(args)


# -- the report ------------------------------------------------------------


def cell(task: str, accuracy: float, forwards: int, **more: Any) -> dict[str, Any]:
    return {
        "task": task,
        "engine": "vllm-dlm",
        "dtype": "float32",
        "concurrency": 8,
        "strategy": "threshold",
        "setting": "threshold, none",
        "questions": 10,
        "accuracy": accuracy,
        "accuracy_error": 0.1,
        "tokens": 100,
        "forwards": forwards,
        "seconds": 2.0,
        "tokens_per_forward": 100 / forwards,
        "tokens_per_second": 50.0,
        **more,
    }


def test_the_mean_of_tasks():
    cells = [cell("a", 0.5, 50), cell("b", 1.0, 25)]
    mean = with_means(cells)[-1]
    assert (mean["task"], mean["accuracy"]) == (MEAN, 0.75)
    assert mean["tokens_per_forward"] == 200 / 75
    assert mean["accuracy_error"] == pytest.approx(0.02**0.5 / 2)
    # With one task, or where a task is missing, there is none.
    assert with_means(cells[:1]) == cells[:1]
    other = cell("a", 0.1, 10, strategy="static", setting="static, none")
    assert len(with_means([*cells, other])) == 4


def test_the_table_has_the_score_of_each_method():
    cells = [
        cell("a", 0.8, 50),
        cell("a", 1.0, 100, strategy="static", setting="static, none"),
        cell("a", 0.9, 100, engine="ar", strategy="", setting="autoregressive"),
    ]
    table = rows(cells)
    assert [row[-1] for row in table] != ["-"] * 3
    # One token a forward: the score is the accuracy.
    assert table[1][-1] == "100.0" and table[2][-1] == "90.0"


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [cell("a", 0.5, 50), cell("b", 1.0, 25)]
    cells += [cell("a", 0.9, 100, engine="ar", strategy="", setting="autoregressive")]
    cells += [cell("b", 0.7, 100, engine="ar", strategy="", setting="autoregressive")]
    plot(cells, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
