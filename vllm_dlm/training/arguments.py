# SPDX-License-Identifier: Apache-2.0
"""The options that the trainings of all built-in models share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from vllm_dlm.cli.arguments import count, output_folder


def add_model_arguments(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """Add the options that the trainings of all built-in models share."""
    parser.add_argument(
        "--output-dir",
        type=output_folder,
        default=output_dir,
        help="folder of the model",
    )
    parser.add_argument(
        "--num-problems",
        type=count,
        default=500,
        help="held-out problems for the numbers in the model card",
    )
    parser.add_argument(
        "--skip-training",
        action="store_true",
        help="only evaluate the model in the folder and write its card",
    )


def trained(args: argparse.Namespace, train: Callable[[], bool]) -> bool:
    """Train, unless only the card is asked for; False if stopped before the last step.

    Args:
        train: Returns whether it has come to the last step.

    Raises:
        ValueError: as `check_model_arguments`, and what `train` raises.
    """
    check_model_arguments(args)
    done = args.skip_training or train()
    if not done:
        say_stopped(args.output_dir)
    return done


def say_stopped(output_dir: str | Path) -> None:
    """Tell how a training goes on that was stopped before its last step."""
    print(f"Stopped before the last step; run again to go on: {output_dir}")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Refuse what would fail after the training only.

    Raises:
        ValueError: no trained model where there has to be one.
    """
    folder = Path(args.output_dir)
    files = ("training.pt", "model.safetensors")
    if args.skip_training and not all((folder / name).is_file() for name in files):
        raise ValueError(
            f"--skip-training: {folder} has no {' and '.join(files)}; leave the option "
            "out to train the model"
        )
