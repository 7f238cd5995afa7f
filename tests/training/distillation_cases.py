# SPDX-License-Identifier: Apache-2.0
"""Rows, learners and runs that the tests of distillation share."""

import argparse
import json

from training.tiny_learner import tiny_folder, tiny_learner

from vllm_dlm.training.recipes.command import start
from vllm_dlm.training.rows import Row, lay_out, task_rows

END, MASK = 0, 2


def batch_of(lengths, canvas, prompt=3):
    """Rows whose answers have so many tokens, their end included."""
    rows = [
        Row([1, *range(10, 9 + prompt + index % 2)], [*range(20, 19 + length), END])
        for index, length in enumerate(lengths)
    ]
    return lay_out(rows, end_id=END, canvas_length=canvas)


def learner_of(folder, **options):
    learner = tiny_learner(folder, **options)
    learner.network.eval()
    return learner


def training_of(folder, recipe, *more):
    """What a command begins with, before its first step."""
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    model = str(tiny_folder(folder / "model"))
    data = write_rows(folder / "rows.jsonl")
    args = [
        model,
        "--output-dir",
        str(folder / "out"),
        "--data",
        str(data),
        "--num-problems",
        "0",
    ]
    return start(recipe.RECIPE, parser.parse_args([*args, *more]))


def write_rows(path, count=30):
    lines = [
        json.dumps({"prompt_ids": row.prompt_ids, "response_ids": row.response_ids})
        for row in task_rows(count, 3)
    ]
    path.write_text("\n".join(lines))
    return path
