# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm search`: its help, its files, its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vllm_dlm import search
from vllm_dlm.cli.command import main
from vllm_dlm.search.command import load_object, read_prompts
from vllm_dlm.tasks.problems import sample_problems

SCORER = """
import math
def check(candidates):
    return [float(one.text.strip() == one.record["answer"]) for one in candidates]
def other(candidates):
    return []
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    problems = sample_problems(3, 0, "heldout", ["copy"])
    lines = [
        json.dumps({"question": each.question, "answer": each.answer})
        for each in problems
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "questions.txt").write_text("Copy [Ada, Ben]\n\nSort [Ben, Ada]\n")
    (tmp_path / "check.py").write_text(SCORER)
    return tmp_path


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    for name in search.SEARCHES:
        with pytest.raises(SystemExit):
            main(["search", name, "--help"])
        text = capsys.readouterr().out
        kind = search.SEARCHES[name]
        for option, field in kind.model_fields.items():
            assert f"--{option.replace('_', '-')}" in text
            assert len(field.description or "") > 12, option
        assert "check.py:check" in text and "--budget-tokens" in text
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in search.SEARCHES)


@pytest.mark.slow  # an engine; tests/server/test_search.py has it with an address
def test_lines_for_lines(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The whole way: a file of prompts, a scorer, JSON lines."""
    out = folder / "new" / "found.jsonl"
    argv = ["search", "best_of_n", "llada-tiny", "--n", "2", "--max-tokens", "32"]
    argv += ["--prompts", str(folder / "questions.jsonl"), "--num", "2", "--all"]
    argv += ["--scorer", f"{folder / 'check.py'}:check", "--out", str(out)]
    argv += ["--engine", '{"enforce_eager": true, "max_num_seqs": 8}', "--seed", "3"]
    assert main(argv) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(each["index"] for each in found) == [0, 1]
    for each in found:
        assert each["prompt"].startswith("Copy [")
        assert each["score"] in (0.0, 1.0) and each["finished"]
        assert each["text"] == each["candidates"][0]["text"]
        assert len(each["candidates"]) == each["stats"]["requests"] == 2
        assert each["stats"]["exhausted"] is None
    assert out.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["mcts"], "'mcts' needs a scorer; without one work: best_of_n"),
        (
            ["best_of_n", "--scorer", "{f}/check.py:chekc"],
            "has no 'chekc'; it has: check",
        ),
        (["best_of_n", "--scorer", "{f}/none.py:check"], "there is no file"),
        (["best_of_n", "--scorer", "check"], "expected FILE.py:NAME"),
        (["best_of_n", "--scorer", "{f}/questions.txt:check"], "is no Python file"),
        (["best_of_n", "--scorer", "{f}/broken.py:check"], "cannot be imported: Name"),
        (["best_of_n", "--n", "0"], "n: .*greater than or equal to 1, got 0"),
        (["best_of_n", "--n", "many"], "n: .*valid integer.*got 'many'"),
        (["best_of_n", "--budget-tokens", "0"], "budget: tokens: .*greater than 0"),
        (["lookahead"], "adadec needs tau"),
        (["vote", "--variants", '{"a": 1}'], "variants: .*valid list"),
        (["best_of_n", "--prompts", "{f}/check.none"], "prompts .*check.none"),
        (["best_of_n", "--prompts", "{f}/bad.jsonl"], "line 1: .*one of the fields"),
        (["best_of_n", "--prompts", "{f}/empty.txt"], "it holds none"),
    ],
)
def test_errors_before_a_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
):
    (folder / "bad.jsonl").write_text('{"answer": 3}\n')
    (folder / "empty.txt").write_text("\n")
    (folder / "broken.py").write_text("check = missing\n")
    argv = [each.format(f=folder) if "{f}" in each else each for each in argv]
    driver, *rest = argv
    prompts = ["--prompts", str(folder / "questions.txt")]
    assert main(["search", driver, "no-such-model", *prompts, *rest]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["best", "m"], "invalid choice: 'best'"),
        (["vote", "m", "--sampling", "3"], "no JSON object"),
        (["vote", "m", "--engine", "{"], "no JSON object"),
        (["vote", "m", "--num", "0"], "not a whole number >= 1"),
    ],
)
def test_arguments_that_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
):
    with pytest.raises(SystemExit):
        main(["search", *argv, "--prompts", "x"])
    assert message in capsys.readouterr().err


def test_prompts_of_a_file(folder: Path):
    texts = read_prompts(str(folder / "questions.txt"), None, False)
    assert texts == [{"prompt": "Copy [Ada, Ben]"}, {"prompt": "Sort [Ben, Ada]"}]
    (first, *_) = read_prompts(str(folder / "questions.jsonl"), 1, True)
    assert first["messages"][0]["content"].startswith("Copy [") and first["answer"]


def test_what_a_file_holds(folder: Path):
    check: Any = load_object(f"{folder / 'check.py'}:check", "scorer")
    assert check([]) == []
