# SPDX-License-Identifier: Apache-2.0
"""The options that all recipes share: data, what is trained, and how."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from vllm_dlm.cli.arguments import count, output_folder
from vllm_dlm.training.loop import add_loop_arguments
from vllm_dlm.training.metrics import REPORTERS, check_reporters

SCHEDULES = ("constant", "linear", "cosine")
CANVAS_MULTIPLE = 32


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
