# SPDX-License-Identifier: Apache-2.0
"""ParallelBench's tasks of free text: questions, metrics, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

import pytest

from vllm_dlm.evaluation import command
from vllm_dlm.evaluation.parallelbench.text_metrics import FACTORS, METRICS, measure_of
from vllm_dlm.evaluation.parallelbench.texts import (
    FIELDS,
    TEXT_TASKS,
    THEMES,
    WORDS,
    Reference,
)
from vllm_dlm.evaluation.tasks import Task, TaskOptions, make_tasks

OF_WORDS = [name for name in TEXT_TASKS if name.startswith("words")]


def only(member: str, *metrics: str, **options: object) -> Task:
    name = f"parallelbench/{member}"
    given = TaskOptions(text_metrics=metrics, **options)  # type: ignore[arg-type]
    (task,) = make_tasks([name], given)
    return task


# -- questions -------------------------------------------------------------


@pytest.mark.parametrize("member", OF_WORDS)
def test_words(member: str):
    """Of one theme, of two, of four fields; each question names its own."""
    groups = FIELDS if member.endswith("hard") else THEMES
    rng, seen = random.Random(0), set()
    for _ in range(50):
        words = TEXT_TASKS[member].draw(rng).words
        of = [
            next(i for i, group in enumerate(groups) if word in group) for word in words
        ]
        assert len(set(words)) == WORDS
        assert (
            len(set(of)) == {"easy": 1, "medium": 2, "hard": 4}[member.split("_")[-1]]
        )
        seen.add(words)
    assert len(seen) > 45
    every = [word for group in groups for word in group]
    assert len(set(every)) == len(every)
    task = only(member, "inclusion", limit=5)
    assert all(len(question.turns) == 1 for question in task.questions)


def test_sentences_and_conversations():
    rng = random.Random(1)
    sentence, talk = TEXT_TASKS["paraphrasing"], TEXT_TASKS["summarization"]
    sentences = {sentence.draw(rng).text for _ in range(100)}
    assert len(sentences) > 90
    for _ in range(20):
        reference = talk.draw(rng)
        assert reference.text in talk.ask(reference)
        speakers = {line.partition(":")[0] for line in reference.text.splitlines()}
        # What the summary says is in the conversation.
        assert len(speakers) == 2 and all(one in reference.summary for one in speakers)


# -- metrics ---------------------------------------------------------------


def test_inclusion_is_by_letters():
    task = only("words_to_sentence_easy", "inclusion", limit=1)
    (question,) = task.questions
    named = question.turns[0].partition("words ")[2].strip(".\n").replace(" and", "")
    words = named.split(", ")
    assert task.score([f"The {' '.join(words)} are here."]) == [1.0]
    assert task.score([" ".join(words[1:])]) == [0.0]
    assert task.score([" ".join(words).title()]) == [0.0]


def test_rouge():
    pytest.importorskip("rouge_score")
    against = [
        Reference(summary="The dogs were running home"),
        Reference(summary="a b c"),
    ]
    texts = ["The dog runs home", ""]

    def of(name: str) -> list[float]:
        return measure_of(name, "summarization", None)(texts, against)

    # Stems: the dog(s) run(s|ning) home: four of four, and four of five.
    assert of("rouge1") == [pytest.approx(2 * 0.8 / 1.8), 0.0]
    # Two pairs of three, and of four: (the dog), (run home).
    assert of("rouge2") == [pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5)), 0.0]
    assert of("rougeL") == of("rouge1")


def test_inverse_bleu():
    pytest.importorskip("sacrebleu")
    text = "one two three four five six"
    texts = [text, "one two three four five", "six five four three two one", ""]
    measure = measure_of("inverse_bleu", "paraphrasing", None)
    found = measure(texts, [Reference(text=text)] * len(texts))
    # All that is written is there, but one word of six is missing.
    assert found == pytest.approx([0, 1 - math.exp(1 - 6 / 5), 1, 0], abs=1e-9)


@pytest.mark.parametrize("member", TEXT_TASKS)
def test_every_metric_of_a_task_is_one(member: str):
    known = TEXT_TASKS[member].metrics
    assert set(known) <= set(METRICS)
    (factors,) = (FACTORS[kind] for kind in FACTORS if member.startswith(kind))
    assert set(factors) < set(known)


def test_grammar_without_a_server():
    pytest.importorskip("language_tool_python")
    with pytest.raises(
        ValueError, match="LanguageTool, which does not answer .*--lang"
    ):
        measure_of("grammar", "paraphrasing", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("metric", "module", "remedy"),
    [
        ("grammar", "language_tool_python", "pip install language-tool-python"),
        ("rougeL", "rouge_score.rouge_scorer", r"vllm-dlm\[eval\]"),
        ("inverse_bleu", "sacrebleu", r"vllm-dlm\[eval\]"),
        ("bertscore", "bert_score", "pip install bert-score"),
    ],
)
def test_a_missing_package_is_named(metric, module, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    member = next(name for name in TEXT_TASKS if metric in TEXT_TASKS[name].metrics)
    with pytest.raises(ValueError, match=f"the metric {metric} .*{remedy}.*another"):
        only(member, metric, limit=1)


# -- published data, and options -------------------------------------------


@pytest.mark.parametrize(
    ("member", "label"),
    [
        ("words_to_sentence_hard", {"example": None, "words": ["sea", "law"]}),
        ("summarization", {"summary": "It rained.", "text": "A: Rain?\nB: Yes."}),
        ("paraphrasing", {"examples": "['x']", "text": "It rained."}),
    ],
)
def test_published_questions(member: str, label: object, tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    chat = [{"role": "user", "content": "Write."}]
    path.write_text(json.dumps({"doc": {"messages": chat, "label": label}}) + "\n")
    name = f"parallelbench/{member}"
    if member in OF_WORDS:
        task = only(member, "inclusion", data={name: path})
        assert task.questions[0].turns == ("Write.",)
        assert task.score(["the law of the sea"]) == [1.0]
        assert list(task.metrics) == ["inclusion"]
    path.write_text(json.dumps({"messages": chat, "label": {"word": "x"}}) + "\n")
    with pytest.raises(ValueError, match=f"line 1: label: not .* {member}"):
        only(member, "inclusion", data={name: path})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--text-metrics", "grammar"], "--text-metrics is for parallelbench"),
        (["parallelbench", "--language-tool", "x"], "--language-tool is for parallel"),
        (
            ["parallelbench/texts", "--text-metrics", "gramar"],
            "'gramar' is none; choose of grammar, inclusion",
        ),
        (
            ["parallelbench/summarization", "--text-metrics", "rougeL,inclusion"],
            "inclusion is measured of words_to_sentence_easy, ",
        ),
        (
            ["parallelbench/texts", "--text-metrics", "inclusion"],
            "parallelbench/paraphrasing has the metrics grammar, inverse_bleu, ",
        ),
        (
            [
                *("parallelbench/texts", "--text-metrics", "rougeL"),
                *("--language-tool", "http://x"),
            ],
            "--language-tool is for the metrics grammar and product",
        ),
    ],
)
def test_refused_before_an_engine_starts(arguments: list[str], message: str):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["llada-tiny", "--tasks", *arguments])
    with pytest.raises(ValueError, match=message):
        command.run(args)


@pytest.mark.slow
def test_a_run(evaluate):
    """A real engine; what it writes is no sentence, and the file says so."""
    name = "parallelbench/words_to_sentence_easy"
    asked = (
        "llada-tiny",
        "--tasks",
        name,
        "--limit",
        "2",
        "--text-metrics",
        "inclusion",
    )
    (cell,) = evaluate(*asked, "--strategies", "threshold")
    assert cell["metric"] == "inclusion"
    assert cell["metrics"] == {"inclusion": cell["accuracy"]} == {"inclusion": 0.0}
    assert cell["questions"] == 2 and cell["forwards"] > 0
