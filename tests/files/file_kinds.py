# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that this package writes and reads, and how files break."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vllm_dlm import trajectories
from vllm_dlm.bench.cells import Results
from vllm_dlm.evaluation.tasks import TaskOptions, make_tasks
from vllm_dlm.files.whole_files import (
    write_json,
    write_text,
)
from vllm_dlm.learn2pd.collect import load_traces, save_traces
from vllm_dlm.learn2pd.recorder import Traces
from vllm_dlm.search.command import read_prompts
from vllm_dlm.spec_decode.aded.trigram_table import (
    TrigramCounts,
    load_table,
    save_table,
)
from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead
from vllm_dlm.steering.options import Constant, read_constant
from vllm_dlm.strategies.learn2pd_filter import Filter, load_filter
from vllm_dlm.strategies.token_frequencies import load_frequencies, save_frequencies
from vllm_dlm.training.counts.token_counts import read_texts
from vllm_dlm.training.drafters.teacher import (
    RecordedAnswers,
    load_tokenizer,
    read_answers,
)
from vllm_dlm.training.metrics import read_metrics
from vllm_dlm.training.progress import Progress, read_progress, write_progress
from vllm_dlm.training.recipes.report import Measure, Measures
from vllm_dlm.training.rows import read_rows

# What is written, and how it is read ---------------------------------------------


def a_filter() -> Filter:
    return Filter.identity(4, 0.9)


def write_filter(path: Path) -> None:
    a_filter().save(path)


def write_frequencies(path: Path) -> None:
    save_frequencies(path, torch.full((5,), 0.2), {})


def write_traces(path: Path) -> None:
    rows = Traces(
        np.full((3, 4), 0.5, np.float32),
        np.ones((3, 4), np.int8),
        np.arange(3, dtype=np.int64),
    )
    save_traces(path, rows, {"model_key": "m-1", "cache": "none", "source": "a test"})


def write_trigrams(path: Path) -> None:
    counts = TrigramCounts(8)
    counts.add([1, 2, 3, 1, 2, 4])
    save_table(path, counts.table())


def write_head(path: Path) -> None:
    """Under the name of a head's file, then where it is asked for."""
    file = AcceptanceHead(8, 2).save(path.parent / f"{path.name}.folder")
    file.rename(path)


def write_released_head(path: Path) -> None:
    """In the layout of the paper's repository."""
    head = {"model.1.weight": torch.zeros(2, 8), "model.1.bias": torch.zeros(2)}
    block = {
        "model.0.linear.weight": torch.eye(8),
        "model.0.linear.bias": torch.ones(8),
    }
    save_file({**head, **block}, path)


def write_pickled_head(path: Path) -> None:
    torch.save(AcceptanceHead(8, 2).state_dict(), path)


def an_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    return optimizer


def write_training(path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    progress = Progress(
        model=model.state_dict(),
        optimizers=[an_optimizer(model).state_dict()],
        step=3,
        seconds=1.5,
        seed=1,
    )
    write_progress(path, progress)


def read_training(path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    read_progress(path).restore(path, model, [an_optimizer(model)])


ENVIRONMENT = {"vllm": "0"}
CELL = {
    **{"key": "k", "engine": "plain", "dtype": "float32", "setting": "static"},
    **{"concurrency": 1, "strategy": "static", "strategy_config": {}, "cache": "none"},
    **{"cache_config": {}, "tokens_per_second": 3.5, "accuracy": None},
}


def write_results(path: Path) -> None:
    path.unlink(missing_ok=True)
    Results(path, resume=False, environment=ENVIRONMENT).add(CELL)


def read_results(path: Path) -> None:
    Results(path, resume=True, environment=ENVIRONMENT)


def write_answers(path: Path) -> None:
    answers = RecordedAnswers(made_with={}, prompts=[[1]], answers=[[2, 3]])
    write_json(path, answers.model_dump(), private=True)


def write_log(path: Path) -> None:
    lines = (
        {"request": "r", "prompt": [1, 2], "mask": 9},
        {"request": "r", "block": [0, 2], "step": 0, "writes": [[0, 4]]},
    )
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines), private=True)


def write_prompts(path: Path) -> None:
    write_text(path, '{"prompt": "Copy [Ada]", "text": "x"}\n')


def write_rows(path: Path) -> None:
    write_text(path, '{"prompt_ids": [1, 9], "response_ids": [20, 0]}\n')


def read_some_rows(path: Path) -> Any:
    return read_rows(path, load_tokenizer("llada-tiny"))


def write_metrics(path: Path) -> None:
    write_text(path, '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n')


def write_measures(path: Path) -> None:
    one = Measure(name="static", options={}, problems=4, right=0.5, forwards=8.0)
    Measures(canvas=32, before=[one]).write(path)


def write_constant(path: Path) -> None:
    one = Constant(mu=-0.8, keep=0.1, tuned="t", base="b", fit="mean", tokens=5, kept=4)
    write_json(path, one.model_dump())


def write_questions(path: Path) -> None:
    write_text(path, '{"question": "1 and 1?", "answer": "So\\n#### 2"}\n')


def read_questions(path: Path) -> Any:
    return make_tasks(["gsm8k"], TaskOptions(data={"gsm8k": path}))


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    suffix: str = ".safetensors"
    private: bool = False


KINDS = {
    "filter": Kind(write_filter, Filter.load),
    "filter, remembered": Kind(write_filter, load_filter),
    "frequencies": Kind(write_frequencies, load_frequencies),
    "traces": Kind(write_traces, load_traces),
    "tri-grams": Kind(write_trigrams, lambda path: load_table(path, 8)),
    "head": Kind(write_head, AcceptanceHead.load),
    "released head": Kind(write_released_head, AcceptanceHead.load),
    "pickled head": Kind(write_pickled_head, AcceptanceHead.load, ".bin"),
    "training": Kind(write_training, read_training, ".pt"),
    "results": Kind(write_results, read_results, ".json"),
    "answers": Kind(write_answers, read_answers, ".json", private=True),
    "log": Kind(
        write_log, lambda p: list(trajectories.read(p)), ".jsonl", private=True
    ),
    "prompts": Kind(
        write_prompts, lambda path: read_prompts(str(path), None, False), ".jsonl"
    ),
    "rows": Kind(write_rows, read_some_rows, ".jsonl"),
    "questions": Kind(write_questions, read_questions, ".jsonl"),
    "metrics": Kind(write_metrics, read_metrics, ".jsonl"),
    "measures": Kind(write_measures, Measures.read, ".json"),
    "steering constant": Kind(write_constant, read_constant, ".json"),
    "texts": Kind(
        write_prompts, lambda path: list(read_texts([path], "text")), ".jsonl"
    ),
}
TENSORS = [name for name, kind in KINDS.items() if kind.suffix == ".safetensors"]
OF_JSON = ("results", "answers")
LINES = ("log", "texts", "prompts", "rows", "metrics", "questions")


def file_of(kind: str, folder: Path) -> Path:
    return folder / f"good{KINDS[kind].suffix}"


# How they break -----------------------------------------------------------------------


def no_file(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe no file of ours \x00")


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def deep_header(path: Path) -> None:
    header = b'{"a":' * 100_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def declares_terabytes(path: Path) -> None:
    header = {
        "w1": {"dtype": "F32", "shape": [1 << 20] * 2, "data_offsets": [0, 1 << 42]}
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def links_in_a_circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def a_sparse_giant(path: Path) -> None:
    """1 PiB, of which nothing is on the disk."""
    path.write_bytes(struct.pack("<Q", 64) + b"{}")
    try:
        os.truncate(path, 1 << 43)
    except OSError:
        pytest.skip("no files of 8 TiB here")


EVERYWHERE = [no_file, no_text, a_folder, a_pipe, a_device, links_in_a_circle]
WHOLE = [empty, half]
