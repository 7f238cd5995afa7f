# SPDX-License-Identifier: Apache-2.0
"""What all recipes share: the way from a model's folder to that of the trained model.

A recipe says how a batch is corrupted and what the loss of that is (`Recipe`); this
module loads the model and the data, runs the steps, and exports.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dlm.training.arguments import say_stopped
from vllm_dlm.training.loop import (
    LoopOptions,
    prepare,
    run_updates,
)
from vllm_dlm.training.metrics import Metrics
from vllm_dlm.training.recipes.options import (
    CANVAS_MULTIPLE,
    add_recipe_arguments,
    check_recipe_arguments,
    rate_of,
)
from vllm_dlm.training.recipes.recipe import RecipeParts, Setting, Training
from vllm_dlm.training.recipes.report import Report
from vllm_dlm.training.rows import (
    Row,
    fitting_rows,
    split_rows,
    step_seed,
    to_device,
)

__all__ = ["Recipe", "Setting", "Training", "dry_run", "start", "train"]

LONGEST_CANVAS = 256
"""Tokens of a canvas, where a dry run is told of none."""


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeParts):
    """A recipe as a command; its parts are those of `RecipeParts`."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of `vllm-dlm train NAME`."""
        add_recipe_arguments(parser)
        self.add_arguments(parser)
        parser.set_defaults(**self.defaults)

    def run(self, args: argparse.Namespace) -> None:
        """Train as the options say, export, measure and write the card."""
        from vllm_dlm.training.distributed import is_first

        if args.dry_run:
            print(dry_run(self, args))
            return
        if args.output_dir is None:
            raise ValueError("--output-dir is missing: the folder of the trained model")
        done = train(self, args)
        if not is_first():
            return
        if done is None:
            say_stopped(args.output_dir)
            return
        print(f"The trained model and its card are in {args.output_dir}")


def start(recipe: Recipe, args: argparse.Namespace) -> Training:
    """Load the model and the data that the options name, and check them.

    Raises:
        ValueError: they cannot be loaded, or do not fit together.
    """
    prepare(LoopOptions.from_args(args))
    from vllm_dlm.training.distributed import distribute, join
    from vllm_dlm.training.learner import load_learner

    processes = join(args.device)
    on_cpu = processes.device.type == "cpu"
    if processes.size > 1:
        if recipe.updates is not None:
            raise ValueError(f"{recipe.name} trains in one process, without torchrun")
        if args.batch_size % processes.size:
            raise ValueError(
                f"{processes.size} processes share the rows of a step evenly: "
                f"--batch-size is a multiple of {processes.size}, not "
                f"{args.batch_size}"
            )
    learner = load_learner(
        args.model,
        lora_rank=args.lora_rank,
        lora_targets=args.lora_targets,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        device=args.device if processes.size == 1 else "cpu",
        dtype=args.dtype or ("float32" if on_cpu else "bfloat16"),
    )
    distribute(learner.network, processes, learner.compute_dtype)
    learner.device = processes.device
    learner.packed = args.packed
    learner.network.checkpointing = args.checkpointing
    rows = recipe.read(args, learner)
    held_out: list[Row] = []
    if recipe.updates is None:
        rows = _fit(args, rows)
        if args.data is not None:
            rows, held_out = _hold_out(args, rows)
    return Training(learner, rows, args, held_out, processes=processes)


def _hold_out(
    args: argparse.Namespace, rows: Sequence[Row]
) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows to measure with: drawn, at most a tenth."""
    number = min(args.num_problems, len(rows) // 10)
    chosen = random.Random(f"held-out-{args.seed}").sample(range(len(rows)), number)
    kept = {*chosen}
    trained = [row for index, row in enumerate(rows) if index not in kept]
    return trained, [rows[index] for index in sorted(kept)]


def dry_run(recipe: Recipe, args: argparse.Namespace) -> str:
    """What memory the training would need, in words.

    Raises:
        ValueError: the model has no config.json, or cannot be trained.
    """
    import torch

    from vllm_dlm.training.learner import model_folder
    from vllm_dlm.training.memory import LENGTHS, build, estimate, report

    check_recipe_arguments(args)
    # On a CPU too, the question is what a GPU needs.
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    network = build(model_folder(args.model, fetched=("config.json",)))
    found = estimate(network, args.lora_rank, args.lora_targets, dtype)
    return report(
        found,
        dtype=dtype,
        masked=args.canvas_length or LONGEST_CANVAS,
        forwards=recipe.forwards,
        lengths=(args.row_length,) if args.row_length else LENGTHS,
    )


def _fit(args: argparse.Namespace, rows: Sequence[Row]) -> list[Row]:
    """The rows that the lengths leave room for; sets the canvas's length."""
    if args.canvas_length is None and args.row_length is None:
        longest = max(len(row.response_ids) for row in rows)
        args.canvas_length = -(-longest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE
    fitting = fitting_rows(
        rows, canvas_length=args.canvas_length, length=args.row_length
    )
    if not fitting:
        raise ValueError(
            "no row fits into --canvas-length or --row-length; the shortest response "
            f"has {min(len(row.response_ids) for row in rows)} tokens"
        )
    from vllm_dlm.training.distributed import is_first

    if len(fitting) < len(rows) and is_first():
        print(f"{len(rows) - len(fitting)} of {len(rows)} rows are too long: left out")
    return fitting


def train(recipe: Recipe, args: argparse.Namespace) -> Training | None:
    """Train and export to --output-dir; None if stopped before the last step.

    Raises:
        ValueError: as `start`; or the checkpoint is of another run.
    """
    check_recipe_arguments(args)
    training = start(recipe, args)
    import torch

    from vllm_dlm.training.distributed import is_first

    report = Report(recipe, training)
    report.measure("before")

    learner = training.learner
    trained = [each for each in learner.network.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=args.learning_rate,
        betas=tuple(args.betas),
        weight_decay=args.weight_decay,
    )

    def updates(step: int) -> Iterator[Mapping[str, float]]:
        # Dropout draws from the global generator: from the step alone, as all else.
        # Another process has other rows, and so other noise.
        torch.manual_seed(step_seed(training.seed, step) + training.processes.rank)
        chosen = recipe.updates or (
            lambda training, step: _update(recipe, training, step)
        )
        for measures in chosen(training, step):
            yield {**measures, **training.notes}
            training.notes.clear()

    rate = rate_of(args)
    reporters = args.report_to if is_first() else ()
    metrics = Metrics(args.output_dir, reporters, vars(args))

    def record(step: int, measures: Mapping[str, float]) -> None:
        now = args.learning_rate * rate(step - 1, args.steps)
        metrics.write(step, {**measures, "learning_rate": now})

    done = run_updates(
        args.output_dir,
        LoopOptions.from_args(args),
        learner.network,
        updates,
        None,
        optimizers=[optimizer],
        rate=rate,
        max_norm=args.max_norm,
        record=record if is_first() else None,
        processes=training.processes,
    )
    metrics.close()
    if not done:
        return None
    learner.save(args.output_dir, decoding=recipe.decoding(args))
    if learner.has_adapter:
        learner.save_adapter(Path(args.output_dir, "adapter"))
    report.measure("after")
    if is_first():
        report.write_card(metrics.seconds)
    return training


def _update(
    recipe: Recipe, training: Training, step: int
) -> Iterator[Mapping[str, float]]:
    """The one update of a step of a recipe that has a loss."""
    if recipe.corrupt is None or recipe.step_loss is None:
        raise ValueError(f"{recipe.name} has neither updates nor corrupt and step_loss")
    recipe.begin_step(training, step)
    batch = training.batch(step)
    example = recipe.corrupt(training, batch, training.generator(step), step)
    example = training.processes.share(example)
    rows = len(batch.ids) // training.processes.size
    total = 0.0
    for part in split_rows(example, rows, training.args.accumulate):
        loss = recipe.step_loss(
            training, to_device(part, training.learner.device), step
        )
        loss.backward()
        total += loss.item()
    yield {"loss": total}
