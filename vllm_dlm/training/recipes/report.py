# SPDX-License-Identifier: Apache-2.0
"""What a training changed: decoded before and after, as a table, a curve and a card.

Held-out problems are answered by the decodings that the recipe names, in the trainer's
own loop (`decoding.py`), which writes an engine's tokens in an engine's forwards.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from vllm_dlm.files.whole_files import read_json, write_json, write_text
from vllm_dlm.tasks import tokenizer as tasks_tokenizer
from vllm_dlm.tasks.problems import sample_problems

if TYPE_CHECKING:
    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.recipes.recipe import RecipeParts, Setting, Training
    from vllm_dlm.training.rows import Row

When: TypeAlias = Literal["before", "after"]

MEASURES = "measures.json"
"""Name of the file of what was measured, in the folder of the trained model."""
CURVE = "curve.png"
_SEED = 2024
_WHAT = "file of measures"


class Measure(BaseModel):
    """A decoding of held-out problems.

    Args:
        name: Of the setting.
        options: Of the request.
        problems: How many were answered.
        right: Share of right answers, 0 to 1.
        forwards: Of a problem, the mean.
    """

    name: str
    options: dict[str, Any]
    problems: int = Field(ge=1)
    right: float = Field(ge=0, le=1)
    forwards: float = Field(ge=0, allow_inf_nan=False)


class Measures(BaseModel):
    """What the file holds."""

    canvas: int = Field(ge=1)
    before: list[Measure] = []
    after: list[Measure] = []

    @classmethod
    def read(cls, path: str | Path) -> Measures:
        """Those of a file.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        return read_json(path, _WHAT, cls)

    def write(self, path: str | Path) -> None:
        """Keep them in a file."""
        write_json(path, self.model_dump())


class Report:
    """The measures and the card of a run.

    Args:
        recipe: What trains.
        training: The run.
    """

    def __init__(self, recipe: RecipeParts, training: Training) -> None:
        self._recipe, self._training = recipe, training
        args = training.args
        self._folder = Path(args.output_dir)
        # An answer has as much room as in training.
        canvas = args.canvas_length
        if canvas is None and args.row_length is not None:
            rows = training.held_out or training.rows
            canvas = args.row_length - max(len(row.prompt_ids) for row in rows)
        self._canvas = max(canvas or 0, 1)
        self._settings = self._measured_settings()
        self._file = self._folder / MEASURES
        self._measures = Measures(canvas=self._canvas)
        if args.resume and self._file.exists():
            known = Measures.read(self._file)
            if known.canvas == self._canvas:
                self._measures = known

    def _measured_settings(self) -> list[Setting]:
        """Those that can be measured; says of the others why they cannot."""
        training = self._training
        if not training.args.num_problems:
            return []
        vocabulary = training.learner.tokenizer.get_vocab()
        asks_tasks = vocabulary == tasks_tokenizer.TOKEN_IDS
        if training.args.data is not None and self._recipe.updates is None:
            asks_tasks = False
        if not training.held_out and not asks_tasks:
            print(
                "Nothing is decoded before and after: that takes the built-in tasks, "
                "or ten rows of --data or more"
            )
            return []
        from vllm_dlm.training.decoding import check_options

        found = []
        for setting in self._recipe.settings(training.args):
            try:
                check_options(training.learner, setting.options, self._canvas)
            except ValueError as error:
                print(f"The decoding {setting.name!r} is not measured: {error}")
            else:
                found.append(setting)
        return found

    def measure(self, when: When) -> None:
        """Decode the held-out problems, unless an interrupted run has done so."""
        known: list[Measure] = getattr(self._measures, when)
        wanted = [(each.name, dict(each.options)) for each in self._settings]
        if when == "before" and [(m.name, m.options) for m in known] == wanted:
            return
        from vllm_dlm.training.distributed import is_first

        training = self._training
        found = measure(
            training.learner,
            self._settings,
            self._canvas,
            training.args.num_problems,
            training.held_out,
            self._recipe.tasks,
        )
        setattr(self._measures, when, found)
        # All processes that train together decode, and one writes.
        if found and is_first():
            self._measures.write(self._file)

    def write_card(self, seconds: float) -> None:
        """Write the card and the curve, and print the table.

        Args:
            seconds: That the steps took.
        """
        training = self._training
        write_card(
            self._recipe, training.args, training.learner, self._measures, seconds
        )
        if self._measures.after:
            print(table(self._measures))


def measure(
    learner: Learner,
    settings: Sequence[Setting],
    canvas: int,
    count: int,
    held_out: Sequence[Row] = (),
    tasks: Sequence[str] | None = None,
) -> list[Measure]:
    """Decode held-out questions in several ways, with a progress bar.

    Args:
        learner: The network.
        settings: The ways.
        canvas: Positions of an answer.
        count: Problems of the built-in tasks, which are asked of a model that has
            llada-tiny's tokens if there are no rows.
        held_out: Rows; an answer is right if it is the row's response.
        tasks: Names of the built-in tasks, all of them by default.

    Raises:
        ValueError: a setting takes an engine to decode.
    """
    from tqdm import tqdm

    from vllm_dlm.training.decoding import decode

    if not settings:
        return []
    if held_out:
        prompts = [row.prompt_ids for row in held_out]
    else:
        problems = sample_problems(count, _SEED, "heldout", tasks)
        prompts = [
            tasks_tokenizer.encode_prompt(problem.question, index % 2 == 0)
            for index, problem in enumerate(problems)
        ]
    found = []
    for setting in tqdm(settings, desc="decoding held-out problems", unit="setting"):
        answers = decode(learner, prompts, setting.options, canvas)
        if held_out:
            right = [
                answer.tokens == row.response_ids
                for answer, row in zip(answers, held_out, strict=True)
            ]
        else:
            right = [
                problem.check(tasks_tokenizer.decode(answer.tokens))
                for answer, problem in zip(answers, problems, strict=True)
            ]
        found.append(
            Measure(
                name=setting.name,
                options=dict(setting.options),
                problems=len(prompts),
                right=sum(right) / len(right),
                forwards=sum(answer.forwards for answer in answers) / len(answers),
            )
        )
    return found


def table(measures: Measures) -> str:
    """Markdown: a row for each way to decode, before and after."""
    lines = [
        "| decoding | forwards before | after | right before | after |",
        "|---|---|---|---|---|",
    ]
    before = {each.name: each for each in measures.before}
    for after in measures.after:
        old = before.get(after.name)
        cells = (
            after.name,
            f"{old.forwards:.2f}" if old else "",
            f"{after.forwards:.2f}",
            f"{100 * old.right:.1f} %" if old else "",
            f"{100 * after.right:.1f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curve(measures: Measures, path: str | Path) -> bool:
    """Draw forwards against right answers, before and after; False without matplotlib.

    Args:
        measures: What was measured.
        path: The picture to write.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for when, marker in (("before", "o"), ("after", "s")):
        points: list[Measure] = sorted(
            getattr(measures, when), key=lambda each: each.forwards
        )
        axes.plot(
            [each.forwards for each in points],
            [100 * each.right for each in points],
            marker=marker,
            label=when,
        )
        for each in points:
            axes.annotate(
                each.name,
                (each.forwards, 100 * each.right),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
    axes.set_xlabel("forwards of an answer")
    axes.set_ylabel("right answers, %")
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return True


def write_card(
    recipe: RecipeParts,
    args: argparse.Namespace,
    learner: Learner,
    measures: Measures | None,
    seconds: float,
) -> str:
    """Write README.md, and the curve, of a trained model; returns the card's text.

    Args:
        recipe: What trained it.
        args: Its options.
        learner: The network.
        measures: Before and after; None if nothing was measured.
        seconds: That the steps took.
    """
    folder = Path(args.output_dir)
    decoding = recipe.decoding(args)
    facts = [f"| {name} | {value} |" for name, value in _facts(args, learner, seconds)]
    parts = [
        "---\ntags: [diffusion-language-model, vllm-dlm]\n---\n",
        f"# {folder.name}\n",
        f"{args.model}, trained by `vllm-dlm train {recipe.name}`:",
        f"{recipe.summary} ({recipe.paper}).\n",
        "| | |\n|---|---|",
        *facts,
        "",
        "## Decoding\n",
        _serving(folder.name, decoding),
    ]
    if measures is not None and measures.after:
        problems = measures.after[0].problems
        parts += [
            "\n## Before and after\n",
            f"{problems} held-out problems, canvas {measures.canvas}, temperature 0.",
            "Forwards are the mean of an answer, to the end of its text. Decoded by",
            "the trainer's own loop with the strategies that serve.\n",
            table(measures),
        ]
        if draw_curve(measures, folder / CURVE):
            parts.append(f"\n![forwards and right answers]({CURVE})")
        else:
            print("No curve: matplotlib is missing; pip install 'vllm-dlm[train]'")
    text = "\n".join(parts) + "\n"
    write_text(folder / "README.md", text)
    return text


def _facts(
    args: argparse.Namespace, learner: Learner, seconds: float
) -> list[tuple[str, str]]:
    """What stands in the card's first table."""
    from vllm_dlm.training.cards import hardware

    trained = sum(
        each.numel() for each in learner.network.parameters() if each.requires_grad
    )
    what = f"{trained / 1e6:.2f} million weights"
    if learner.has_adapter:
        what += f" of an adapter of rank {args.lora_rank} ({args.lora_targets}), merged"
    data = args.data or f"the built-in tasks, {args.num_rows} rows"
    machine = hardware() if learner.device.type == "cpu" else _gpu(learner)
    return [
        ("command", f"`{shlex.join(['vllm-dlm', *sys.argv[1:]])}`"),
        ("data", str(data)),
        ("trained", what),
        ("steps, rows of each, seed", f"{args.steps}, {args.batch_size}, {args.seed}"),
        ("optimizer", _optimizer(args)),
        ("computed in", str(learner.compute_dtype).removeprefix("torch.")),
        ("time", f"{seconds / 60:.1f} minutes on {machine}"),
    ]


def _optimizer(args: argparse.Namespace) -> str:
    return (
        f"AdamW {args.betas[0]:g}/{args.betas[1]:g}, learning rate "
        f"{args.learning_rate:g} {args.schedule}, warm-up {args.warmup:g} of the "
        f"steps, weight decay {args.weight_decay:g}, gradients clipped to "
        f"{args.max_norm:g}"
    )


def _gpu(learner: Learner) -> str:
    import torch

    return torch.cuda.get_device_name(learner.device)


def _serving(name: str, decoding: Mapping[str, Any]) -> str:
    """How the trained model is decoded by default."""
    if not decoding:
        return f"`vllm serve {name}`, with the defaults of its family."
    options = ", ".join(f"{key} {value}" for key, value in decoding.items())
    return (
        f"`vllm serve {name}` decodes with {options}: `dlm_options` in config.json, "
        "which flags and requests override."
    )
