# SPDX-License-Identifier: Apache-2.0
"""What all recipes share: their options, and the way from a folder to a folder.

A recipe says how a batch is corrupted and what the loss of that is (`Recipe`); this
module loads the model and the data, runs the steps, and exports.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dlm.cli.arguments import count, output_folder
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_updates,
)
from vllm_dlm.training.metrics import REPORTERS, Metrics, check_reporters
from vllm_dlm.training.recipes.report import Report
from vllm_dlm.training.rows import (
    Batch,
    Row,
    fitting_rows,
    lay_out,
    read_rows,
    rows_of_step,
    split_rows,
    step_generator,
    step_seed,
    task_rows,
    to_device,
)

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.distributed import Processes
    from vllm_dlm.training.learner import Learner

SCHEDULES = ("constant", "linear", "cosine")
CANVAS_MULTIPLE = 32
LONGEST_CANVAS = 256
"""Tokens of a canvas, where a dry run is told of none."""


@dataclass(frozen=True)
class Setting:
    """A way to decode, before and after the training.

    Args:
        name: In the card's table.
        options: Options of a request, such as {"strategy": "static"}.
    """

    name: str
    options: Mapping[str, Any]


def _one_process() -> Processes:
    from vllm_dlm.training.distributed import alone

    return alone("cpu")


@dataclass
class Training:
    """A run of a recipe.

    Args:
        learner: The network; where it is, what it is.
        rows: The data, in the file's order; what `Recipe.read` returned.
        args: All options, the recipe's own among them.
        held_out: Rows of the data that are not trained on, but measured with.
        notes: What `note` has added up.
        kept: What a recipe keeps between steps, by name; no part of a checkpoint.
    """

    learner: Learner
    rows: Sequence[Any]
    args: argparse.Namespace
    held_out: Sequence[Row] = ()
    notes: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    processes: Processes = field(default_factory=_one_process)
    """Those that train together."""

    @property
    def seed(self) -> int:
        return int(self.args.seed)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.args.steps)

    def note(self, **measures: float | torch.Tensor) -> None:
        """Add to measures of the step, for the metrics; summed over its parts."""
        for name, value in measures.items():
            self.notes[name] = self.notes.get(name, 0.0) + float(value)

    def batch(self, step: int) -> Batch:
        """The step's rows, laid out as the options say."""
        return lay_out(
            rows_of_step(self.rows, self.args.batch_size, self.seed, step),
            end_id=self.learner.end_id,
            canvas_length=self.args.canvas_length,
            length=self.args.row_length,
        )

    def generator(self, step: int) -> torch.Generator:
        """Where the step's noise is drawn from, for the whole batch at once."""
        return step_generator(self.seed, step)

    @contextmanager
    def initial(self) -> Iterator[Learner]:
        """The model before the training, as a teacher: no gradients, no dropout.

        With an adapter it is the same network, the adapter off; else a copy that is
        loaded from the model's folder, also where a run goes on.
        """
        import torch

        from vllm_dlm.training.learner import load_learner

        if self.learner.has_adapter:
            self.learner.network.eval()
            with torch.no_grad(), self.learner.without_adapter():
                yield self.learner
            self.learner.network.train()
            return
        if "initial" not in self.kept:
            copy = load_learner(self.args.model, dtype=self.args.dtype)
            # Every process has one of its own, whole.
            copy.network.to(self.learner.device).eval().requires_grad_(False)
            copy.device = self.learner.device
            copy.compute_dtype = self.learner.compute_dtype
            copy.packed = self.learner.packed
            self.kept["initial"] = copy
        with torch.no_grad():
            yield self.kept["initial"]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def _read(args: argparse.Namespace, learner: Learner) -> Sequence[Row]:
    """The rows of --data, or of the built-in tasks."""
    if args.data is not None:
        return read_rows(args.data, learner.tokenizer, learner.end_id)
    from vllm_dlm.tasks.tokenizer import TOKEN_IDS

    if learner.tokenizer.get_vocab() != TOKEN_IDS:
        raise ValueError(
            "the built-in tasks are written in llada-tiny's tokens, which "
            f"{args.model} does not have; pass a .jsonl file with --data"
        )
    return task_rows(args.num_rows, args.seed)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained for a decoding rule.

    A step's loss is a sum over its rows of what each contributes, so that it may be
    computed in parts (--accumulate, several processes). A mean is therefore taken over
    the step's rows, or over counts that `corrupt` has put into the example.

    Args:
        name: Of `vllm-dlm train NAME`.
        summary: What it is for.
        paper: Where it comes from.
        corrupt: (training, batch, generator, step) -> the step's example, a dataclass
            of tensors whose first dimension is the batch's rows.
        step_loss: (training, example, step) -> what the example's rows contribute to
            the loss. The example has some rows of the step, on the learner's device.
        updates: (training, step) -> the updates of a step, as of `run_updates`: in
            place of `corrupt` and `step_loss`, for recipes that roll out.
        read: (args, learner) -> the data; by default the rows of --data.
        begin_step: (training, step) -> None, before a step's rows are drawn: a recipe
            may give `training.rows` new ones, a function of the step alone.
        decoding: args -> options of a request that the trained model is for; they
            become the folder's defaults.
        settings: args -> ways to decode that the card compares, before and after.
        tasks: Built-in tasks that are asked for it, all of them by default.
        add_arguments: Adds options of the recipe's own.
        defaults: Of the shared options, by their names in the namespace.
        forwards: Of a step, with a backward pass in common; what each keeps for that
            is in memory at once.
    """

    name: str
    summary: str
    paper: str
    corrupt: Callable[[Training, Batch, torch.Generator, int], Any] | None = None
    step_loss: Callable[[Training, Any, int], torch.Tensor] | None = None
    updates: Callable[[Training, int], Iterator[Mapping[str, float]]] | None = None
    read: Callable[[argparse.Namespace, Learner], Sequence[Any]] = _read
    begin_step: Callable[[Training, int], None] = lambda training, step: None
    decoding: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda args: {}
    settings: Callable[[argparse.Namespace], Sequence[Setting]] = lambda args: ()
    tasks: Sequence[str] | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    defaults: Mapping[str, Any] = field(default_factory=dict)
    forwards: int = 1

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
            print(
                f"Stopped before the last step; run again to go on: {args.output_dir}"
            )
            return
        print(f"The trained model and its card are in {args.output_dir}")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that all recipes share."""
    parser.add_argument(
        "model", metavar="MODEL", help="the model to train: folder, hub id or alias"
    )
    parser.add_argument(
        "--output-dir", type=output_folder, help="its folder afterwards"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: tell what memory this training needs, from the model's "
        "config.json alone, and what fits on which GPU",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="FILE.jsonl",
        help="rows, one a line, in one of the forms of docs/training.md; by default "
        "the built-in tasks, in llada-tiny's tokens",
    )
    data.add_argument(
        "--num-rows",
        type=count,
        default=20_000,
        help="how many rows of the built-in tasks are drawn",
    )
    data.add_argument(
        "--canvas-length",
        type=count,
        metavar="G",
        help="tokens of a canvas, filled with the end token behind the response; by "
        f"default the longest response, rounded up to a multiple of {CANVAS_MULTIPLE}",
    )
    data.add_argument(
        "--row-length",
        type=count,
        metavar="L",
        help="tokens of prompt and canvas together, in place of --canvas-length",
    )
    data.add_argument("--batch-size", type=count, default=24, help="rows of a step")
    data.add_argument(
        "--accumulate",
        type=count,
        default=1,
        metavar="PARTS",
        help="compute a step's rows in so many parts, one after the other: less "
        "memory, the same result",
    )
    data.add_argument(
        "--num-problems",
        type=_from_zero,
        default=120,
        metavar="N",
        help="held-out problems, or rows of --data that are left out of the training, "
        "at most a tenth, to decode before and after; 0 measures nothing",
    )
    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--lora-rank",
        type=count,
        metavar="R",
        help="train an adapter of this rank and merge it; by default all weights",
    )
    what.add_argument(
        "--lora-targets",
        choices=("reference", "all"),
        default="all",
        help="matrices with an adapter: those that the published code reaches, or all "
        "of the layers",
    )
    what.add_argument("--lora-alpha", type=float, help="scale of the adapter, times R")
    what.add_argument(
        "--lora-dropout", type=float, default=0.0, help="dropout before the adapter"
    )
    how = parser.add_argument_group("how it is trained")
    how.add_argument("--learning-rate", type=float, default=5e-4, help="the full one")
    how.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        help="of the learning rate, behind the warm-up",
    )
    how.add_argument(
        "--warmup",
        type=float,
        default=0.0,
        help="share of the steps in which the learning rate rises from 0",
    )
    how.add_argument(
        "--lowest-rate",
        type=float,
        default=0.0,
        help="share of the learning rate at which linear and cosine end",
    )
    how.add_argument(
        "--betas", type=float, nargs=2, default=(0.9, 0.999), help="of AdamW"
    )
    how.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    how.add_argument(
        "--max-norm", type=float, default=1.0, help="gradients are clipped to it"
    )
    how.add_argument("--device", default="cpu", help="as PyTorch names it")
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type that is computed in; by default float32 on a CPU, else bfloat16",
    )
    how.add_argument(
        "--report-to",
        nargs="+",
        choices=REPORTERS,
        default=[],
        help="dashboards that get each step's measures, besides metrics.jsonl",
    )
    how.add_argument(
        "--packed",
        action=argparse.BooleanOptionalAction,
        help="compute rows of different lengths side by side instead of padded; the "
        "result is the same; by default where a tenth of the positions is left out",
    )
    how.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep each layer's input only, and compute the layer again backwards: "
        "less memory, a third more time",
    )
    add_loop_arguments(parser, steps=200)
    parser.set_defaults(compile=False)


def _from_zero(text: str) -> int:
    return 0 if text == "0" else count(text)


def check_recipe_arguments(args: argparse.Namespace) -> None:
    """Refuse values that cannot work, before anything is loaded.

    Raises:
        ValueError: one of them; the message says what could.
    """
    for name, least, most in (
        ("learning_rate", 0.0, math.inf),
        ("warmup", 0.0, 1.0),
        ("lowest_rate", 0.0, 1.0),
        ("weight_decay", 0.0, math.inf),
    ):
        value = getattr(args, name)
        if not least <= value <= most or value == math.inf:
            upper = "" if most == math.inf else f" to {most:g}"
            raise ValueError(
                f"--{name.replace('_', '-')} {value:g}: from {least:g}{upper}"
            )
    if not args.max_norm > 0:
        raise ValueError(f"--max-norm {args.max_norm:g}: above 0")
    if not all(0 <= beta < 1 for beta in args.betas):
        raise ValueError(f"--betas {args.betas[0]:g} {args.betas[1]:g}: each below 1")
    if args.canvas_length is not None and args.row_length is not None:
        raise ValueError("either --canvas-length or --row-length")
    if args.lora_rank is None:
        for name in ("lora_alpha", "lora_dropout"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is of an adapter: set --lora-rank too")
    elif args.lora_alpha is not None and not args.lora_alpha > 0:
        raise ValueError(f"--lora-alpha {args.lora_alpha:g}: above 0")
    if args.compile:
        raise ValueError("--compile is for the built-in models; leave it out here")
    check_reporters(args.report_to)


def rate_of(args: argparse.Namespace) -> Callable[[int, int], float]:
    """The schedule of the options: share of the full rate at a step of so many."""
    lowest, warmup = args.lowest_rate, args.warmup

    def rate(step: int, steps: int) -> float:
        rising = warmup * steps
        if step < rising:
            return float((step + 1) / max(rising, 1.0)) if rising > 1 else 1.0
        done = (step - rising) / max(steps - rising, 1.0)
        if args.schedule == "linear":
            return float(lowest + (1 - lowest) * (1 - done))
        if args.schedule == "cosine":
            return float(lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * done)))
        return 1.0

    return rate


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

    from vllm_dlm.training.memory import (
        LENGTHS,
        build,
        config_folder,
        estimate,
        report,
    )

    check_recipe_arguments(args)
    # On a CPU too, the question is what a GPU needs.
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    network = build(config_folder(args.model))
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
