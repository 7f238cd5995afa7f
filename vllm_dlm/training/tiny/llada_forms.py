# SPDX-License-Identifier: Apache-2.0
"""Train the built-in model llada-forms: `vllm-dlm train llada-forms`.

The sibling of llada-tiny that can spell JSON: the same network with a vocabulary of
bytes and words, and other tasks (`vllm_dlm/tasks/forms/`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks.forms import vocabulary
from vllm_dlm.training.arguments import add_model_arguments, trained
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_steps,
)
from vllm_dlm.training.tiny.forms_data import make_batch

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel

NAME = "llada-forms"
STEPS = 10_500
MAX_CANVAS = 256
# While training: held-out problems of each kind, and tokens written in a step.
NUM_PROGRESS_PROBLEMS, PROGRESS_TOKENS = 4, 4


def make_model() -> LLaDAModel:
    """The untrained model: llada-tiny's network with another vocabulary."""
    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

    return LLaDAModel(
        LLaDAShape(
            vocab_size=vocabulary.VOCAB_SIZE,
            max_sequence_length=vocabulary.MAX_LENGTH,
        )
    )


def train(output_dir: str | Path, options: LoopOptions) -> bool:
    """Train the model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint `training.pt`.
        options: How to run.
    """
    prepare(options)
    import torch

    from vllm_dlm.training.tiny.export import export
    from vllm_dlm.training.tiny.forms_evaluation import evaluate_model
    from vllm_dlm.training.tiny.masking import batch_loss

    model = make_model()

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        return batch_loss(forward, [make_batch(step, options.seed)])

    def evaluate_step(step: int) -> dict[str, float]:
        return evaluate_model(
            model, NUM_PROGRESS_PROBLEMS, seed=step, tokens_per_step=PROGRESS_TOKENS
        )

    done = run_steps(output_dir, options, model, step_loss, evaluate_step)
    if done:
        export(
            model,
            output_dir,
            max_canvas=MAX_CANVAS,
            save_tokenizer=vocabulary.save_tokenizer,
            dtype=torch.bfloat16,
        )
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train llada-forms`."""
    add_model_arguments(parser, NAME)
    add_loop_arguments(parser, steps=STEPS)


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    from vllm_dlm.training.tiny.forms_card import write_card

    if not trained(args, lambda: train(args.output_dir, LoopOptions.from_args(args))):
        return
    print(write_card(args.output_dir, args.num_problems, MAX_CANVAS))


def main() -> None:
    """Entry point of `python -m vllm_dlm.training.tiny.llada_forms`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
