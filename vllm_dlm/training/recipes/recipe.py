# SPDX-License-Identifier: Apache-2.0
"""What a recipe is, and what a run of one has: the shapes that all recipes fill.

A recipe says how a batch is corrupted and what the loss of that is; `command.Recipe`
adds how it is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_dlm.training.rows import (
    Batch,
    Row,
    lay_out,
    read_rows,
    rows_of_step,
    step_generator,
    task_rows,
)

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.distributed import Processes
    from vllm_dlm.training.learner import Learner


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
class RecipeParts:
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
        forwards: Of each row in a step, with a backward pass in common; what each
            keeps for that is in memory at once.
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
