# SPDX-License-Identifier: Apache-2.0
"""Options of trainings that fine-tune an autoregressive model on its own answers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_dlm.training.arguments import add_model_arguments
from vllm_dlm.training.loop import LoopOptions, add_loop_arguments

BATCH_ROWS = 48
NUM_PROMPTS = 8000
SCALE = 0.3
"""Of the learning rates of `loop.py`, which are for networks that know nothing."""


@dataclass(frozen=True)
class CausalOptions:
    """What is fine-tuned, and on what.

    Args:
        model: Folder, hub id or alias of an autoregressive model.
        prompts: File of prompts, as in `load_prompts`; None asks the built-in tasks.
        num_prompts: Most prompts.
        max_tokens: Most tokens of an answer.
        batch_rows: Answers of a step.
        scale: Factor of the learning rates of a training from nothing.
        device: As PyTorch names it.

    Raises:
        ValueError: a value out of its range.
    """

    model: str
    prompts: str | Path | None = None
    num_prompts: int = NUM_PROMPTS
    max_tokens: int = 64
    batch_rows: int = BATCH_ROWS
    scale: float = SCALE
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ValueError(f"batch_rows must be at least 1, not {self.batch_rows}")
        if not self.scale > 0:
            raise ValueError(f"learning_rate_scale must be above 0, not {self.scale}")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> CausalOptions:
        """The options that `add_causal_arguments` has added to a parser."""
        return cls(
            model=args.model,
            prompts=args.prompts,
            num_prompts=args.num_prompts,
            max_tokens=args.max_tokens,
            batch_rows=args.batch_rows,
            scale=args.learning_rate_scale,
            device=args.device,
        )


def uncompiled(options: LoopOptions) -> LoopOptions:
    """A network of transformers is compiled on demand only: many are not made for it.

    Checkpoints and schedules are the same.
    """
    return replace(options, compile_model=bool(options.compile_model))


def add_causal_arguments(
    parser: argparse.ArgumentParser, *, output_dir: str, steps: int
) -> None:
    """Add what the trainings of autoregressive models share."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="the autoregressive model to fine-tune: folder, hub id or alias",
    )
    add_model_arguments(parser, output_dir)
    parser.add_argument(
        "--prompts",
        help="text file, one prompt per line, or .jsonl with the key "
        '"prompt"; by default the tasks of the built-in models',
    )
    parser.add_argument(
        "--num-prompts", type=int, default=NUM_PROMPTS, help="most prompts answered"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=64, help="most tokens of an answer"
    )
    parser.add_argument(
        "--batch-rows", type=int, default=BATCH_ROWS, help="answers of a step"
    )
    parser.add_argument(
        "--learning-rate-scale",
        type=float,
        default=SCALE,
        help="factor of the learning rates of a training from nothing",
    )
    parser.add_argument(
        "--device", default="cpu", help="of the model, as PyTorch names it (cpu)"
    )
    add_loop_arguments(parser, steps=steps)
