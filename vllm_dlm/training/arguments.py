# SPDX-License-Identifier: Apache-2.0
"""The options that the trainings of all built-in models share."""

from __future__ import annotations

import argparse
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
