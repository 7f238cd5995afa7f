# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of speculation ask, of whom, and an engine that answers."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dlm.config.aliases import resolve
from vllm_dlm.tasks.problems import sample_problems

TARGET = "llama-tiny"
MAX_TOKENS = 64
CORPUS_ANSWERS = 2000
"""Answers of llama-tiny to training questions, for ADED's table of tri-grams."""
OWN_CORPUS_ANSWERS = 100
"""The same of a model of the user's, to the questions behind the measured ones."""

Config = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Who answers what."""

    model: str
    questions: list[str]
    corpus_questions: list[str]
    checks: list[Callable[[str], bool]] | None
    """Whether a text answers its question; None if nobody knows."""
    is_chat: bool
    max_tokens: int
    dtype: str
    history: Sequence[dict[str, str]] = ()
    """Turns of a chat before each question."""

    @property
    def engine_options(self) -> dict[str, Any]:
        options = {"model": self.model, "dtype": self.dtype}
        if self.has_drafters:
            return options
        # Room for some of a real model's requests at a time.
        return {**options, "max_model_len": 2048, "kv_cache_memory_bytes": 1 << 30}

    @property
    def has_drafters(self) -> bool:
        return self.checks is not None


@contextmanager
def engine(config: Config | None, requests: int, **options: Any) -> Iterator[Any]:
    """An engine in this process, where its parts can be counted."""
    from vllm import LLM
    from vllm.distributed.parallel_state import destroy_model_parallel

    destroy_model_parallel()
    options = {"kv_cache_memory_bytes": 256 << 20} | options
    llm = LLM(
        options.pop("model", None) or resolve(TARGET),
        speculative_config=config,
        max_num_seqs=requests,
        enforce_eager=True,
        # Found again, a prompt would cost later settings less than earlier ones.
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


def answer(
    llm: Any, workload: Workload, questions: Sequence[str], temperature: float
) -> tuple[list[list[int]], list[str]]:
    """Tokens and texts of the answers."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=workload.max_tokens
        )
        for seed in range(len(questions))
    ]
    if workload.is_chat:
        chats = [
            [*workload.history, {"role": "user", "content": question}]
            for question in questions
        ]
        results = llm.chat(chats, sampling, use_tqdm=False)
    else:
        results = llm.generate(list(questions), sampling, use_tqdm=False)
    outputs = [result.outputs[0] for result in results]
    return [list(o.token_ids) for o in outputs], [o.text for o in outputs]


def count_corpus(workload: Workload, folder: Path) -> Path:
    """Write the tri-grams of the target's answers to other questions."""
    from vllm_dlm.cli.command import main as command

    texts = folder / "answers.jsonl"
    questions = workload.corpus_questions
    with engine(None, 32, **workload.engine_options) as llm:
        _, answers = answer(llm, workload, questions, 0.0)
    with texts.open("w", encoding="utf-8") as file:
        for question, text in zip(questions, answers, strict=True):
            whole = text if workload.is_chat else f"{question}{text}"
            file.write(json.dumps({"text": whole}) + "\n")
    path = folder / "trigrams.safetensors"
    status = command(
        [
            *("count-trigrams", str(texts)),
            *("--tokenizer", workload.model, "--out", str(path)),
        ]
    )
    if status:
        raise SystemExit(status)
    return path


def built_in(num_problems: int, dtype: str, num_earlier: int = 0) -> Workload:
    """llama-tiny and its questions.

    Args:
        num_earlier: questions that were asked and answered before, in the same chat;
            llama-tiny has not learnt chats of several turns, so that it answers worse.
    """
    history = [
        {"role": role, "content": text}
        for problem in sample_problems(num_earlier, 1)
        for role, text in (("user", problem.question), ("assistant", problem.answer))
    ]
    problems = sample_problems(num_problems, 0, "heldout")
    return Workload(
        model=TARGET,
        questions=[problem.question for problem in problems],
        corpus_questions=[
            problem.question for problem in sample_problems(CORPUS_ANSWERS, seed=0)
        ],
        checks=[problem.check for problem in problems],
        is_chat=bool(history),
        max_tokens=MAX_TOKENS,
        dtype=dtype,
        history=history,
    )


def from_file(
    model: str, path: Path, num_problems: int, max_tokens: int, dtype: str
) -> Workload:
    """A model of the user's, and questions of JSON lines with a field `question`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines if line.strip()]
    corpus = questions[num_problems : num_problems + OWN_CORPUS_ANSWERS]
    if not corpus:
        raise SystemExit(
            f"{path} has {len(questions)} questions: it needs more than the "
            f"{num_problems} that are measured, for ADED's corpus"
        )
    return Workload(
        model, questions[:num_problems], corpus, None, True, max_tokens, dtype
    )
