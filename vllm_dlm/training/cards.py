# SPDX-License-Identifier: Apache-2.0
"""What the model cards share: their head, held-out questions, tables and sizes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS, sample_problems

EVALUATION_SEED = 2024
HEAD = """\
---
license: apache-2.0
language: en
{pipeline}tags: [{tags}, vllm-dlm]
---

# {name}

"""


def accuracy_table(measures: Mapping[str, Callable[[str], float]]) -> str:
    """Markdown table of exact match: a row per task, and "all" weighted as trained.

    Args:
        measures: Title of a column -> exact match of the task of a name.
    """
    weights = {name: task.weight for name, task in TASKS.items()}
    columns = []
    for measure in tqdm(measures.values(), desc="evaluating"):
        column = {task: measure(task) for task in TASKS}
        total = sum(weights[name] * column[name] for name in weights)
        column["**all**"] = total / sum(weights.values())
        columns.append(column)
    lines = [
        f"| task | {' | '.join(measures)} |",
        "|---" * (len(measures) + 1) + "|",
    ]
    for name in columns[0]:
        cells = " | ".join(f"{100 * column[name]:.1f} %" for column in columns)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def hardware() -> str:
    """The machine and the threads, as the cards name them."""
    threads = torch.get_num_threads()
    return (
        f"{os.cpu_count()} shared {platform.machine()} CPU cores, {threads} "
        f"thread{'s' if threads > 1 else ''}"
    )


def held_out_prompts(count: int) -> list[list[int]]:
    """Questions that no training has seen; every other one as a chat."""
    problems = sample_problems(count, EVALUATION_SEED, "heldout")
    return [
        tokenizer.encode_prompt(problem.question, chat=index % 2 == 0)
        for index, problem in enumerate(problems)
    ]


def megabytes(folder: Path) -> float:
    """Size of a folder's weights, in MB."""
    return (folder / "model.safetensors").stat().st_size / 1e6


def millions(model: torch.nn.Module) -> float:
    """Number of a model's parameters, in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6
