# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm answers`: what an engine answers, as rows to train on."""

from __future__ import annotations

import argparse
import json

import pytest
from engine.cases import make_prompt
from engine.harness import Engine, params

from vllm_dlm.cli.command import main
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import Problem
from vllm_dlm.training import answers
from vllm_dlm.training.answer_log import Answer, append_answers, read_answers


def parsed(*more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    answers.add_arguments(parser)
    return parser.parse_args(["llada-tiny", "rows.jsonl", *more])


def test_answers_are_the_engine_s(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answers, "PART", 2)
    prompts = [list(make_prompt(length)) for length in (5, 9, 7, 12, 6)]
    right = Problem("copy", "Copy [Ada, Ben, Carl]", "[Ada, Ben, Carl]")
    questions = [answers.Question(prompt) for prompt in prompts[:4]]
    questions.append(answers.Question(prompts[4], right))
    args = parsed("--max-tokens", "24", "--block-length", "8")
    parts = list(answers.ask(engine.llm, args, questions))
    assert [len(part) for part in parts] == [2, 2, 1]
    found = [answer for part in parts for answer in part]
    wanted = engine.run(
        prompts, params(24, dlm={"strategy": "static", "block_length": 8})
    )
    assert [row.prompt_ids for row in found] == prompts
    assert [row.response_ids for row in found] == [one.tokens for one in wanted]
    # Nothing stands behind the first end.
    assert all(2 not in row.response_ids[:-1] for row in found)
    assert [row.right for row in found] == [None] * 4 + [False]


def test_a_run_that_goes_on_draws_the_same(engine: Engine):
    prompts = [list(make_prompt(length)) for length in (5, 9, 7)]
    questions = [answers.Question(prompt) for prompt in prompts]
    more = ("--temperature", "1", "--strategy", "threshold")
    args = parsed("--max-tokens", "16", *more, "--strategy-config", '{"threshold": 2}')
    [whole] = answers.ask(engine.llm, args, questions)
    [rest] = answers.ask(engine.llm, args, questions, first=1)
    assert whole[1:] == rest
    args.seed = 7
    [other] = answers.ask(engine.llm, args, questions)
    assert other != whole


def test_the_file_of_an_unfinished_run(tmp_path):
    file = tmp_path / "more" / "rows.jsonl.part"
    assert read_answers(file, {"seed": 1}) == []
    rows = [Answer([1], [2, 0], True), Answer([1, 2], [0], None, [3])]
    append_answers(file, {"seed": 1}, rows[:1])
    append_answers(file, {"seed": 1}, rows[1:])
    assert read_answers(file, {"seed": 1}) == rows
    with file.open("a") as part:
        part.write('{"prompt_ids": [1')
    assert read_answers(file, {"seed": 1}) == rows
    append_answers(file, {"seed": 1}, rows)
    assert read_answers(file, {"seed": 1}) == rows * 2
    with pytest.raises(ValueError, match="they were made with other options"):
        read_answers(file, {"seed": 2})
    file.write_text('{"seed": 1}\n{"prompt_ids": "x"}\n')
    with pytest.raises(ValueError, match=r"cannot read the answers .*rows.jsonl.part"):
        read_answers(file, {"seed": 1})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "copi"), "--tasks: .*copi.*copy"),
        (("--strategy", "statik"), "--strategy: .*statik.*static"),
        (("--chat",), "--chat is for --prompts"),
        (("--prompts", "FILE", "--keep-wrong"), "--keep-wrong is for the built-in"),
        (("--prompts", "FILE", "--tasks", "copy"), "--tasks is for the built-in"),
        (("--prompts", "missing.txt"), "cannot read the prompts missing.txt"),
        (("--temperature", "-1"), "--temperature is 0 or more"),
        (("--strategy-config", "[1]"), "expected a JSON object"),
    ],
)
def test_refusals(tmp_path, capsys, more, message):
    import re

    file = tmp_path / "prompts.txt"
    file.write_text("Copy [Ada, Ben, Carl]\n")
    more = [str(file) if each == "FILE" else each for each in more]
    out = str(tmp_path / "rows.jsonl")
    assert main(["answers", "llada-tiny", out, *more]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_keeps_right_answers(tmp_path, capsys, monkeypatch):
    """Interrupted after a part, and gone on with."""
    from vllm_dlm.training.drafters.teacher import load_tokenizer
    from vllm_dlm.training.rows import read_rows

    monkeypatch.setattr(answers, "PART", 8)
    out = tmp_path / "rows.jsonl"
    command = ["answers", "llada-tiny", str(out), "--num", "24", "--max-tokens", "32"]
    command += ["--trajectory-dir", str(tmp_path / "log")]
    asked, ask = [], answers.ask

    def interrupted(*arguments):
        for part in ask(*arguments):
            yield part
            asked.append(len(part))
            if len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(answers, "ask", interrupted)
    assert main(command) == 130
    assert not out.exists()
    assert main(command) == 0
    assert asked == [8, 8, 8]
    assert not (tmp_path / "rows.jsonl.part").exists()
    rows = read_rows(out, load_tokenizer("llada-tiny"))
    assert f"{len(rows)} of 24 answers kept" in capsys.readouterr().out
    assert 20 <= len(rows) <= 24
    end = tokenizer.EOS_ID
    assert all(row.response_ids.index(end) + 1 == len(row.response_ids) for row in rows)
    assert len({json.dumps(row.prompt_ids) for row in rows}) == len(rows)

    from vllm_dlm.training.recipes.d3llm import read_log

    steps = {tuple(row.prompt_ids): row for row in read_log(tmp_path / "log", end)}
    for row in rows:
        logged = steps[tuple(row.prompt_ids)]
        assert logged.response_ids == row.response_ids
        # One token per step: no two have the same.
        assert len(set(logged.steps)) == len(logged.steps)
