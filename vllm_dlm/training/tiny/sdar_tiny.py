# SPDX-License-Identifier: Apache-2.0
"""Train the built-in block-causal model sdar-tiny: `vllm-dlm train sdar-tiny`.

Block diffusion in SDAR's layout (arXiv 2510.06303) on the tasks of llada-tiny. The
blocks grow while training, from 2 tokens to 4 and to 8: with few masks in a block much
of the answer is given, so that the tasks are learnt sooner (TDAR's extension).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.arguments import add_model_arguments, trained
from vllm_dlm.training.loop import LoopOptions, add_loop_arguments, prepare, run_steps
from vllm_dlm.training.tiny.sdar_stages import BLOCK_LENGTH, block_length_at

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.block_causal import BlockCausalModel
    from vllm_dlm.training.streams import Streams

NAME = "sdar-tiny"
STEPS = 7500
MAX_LENGTH = 1024
NUM_PROGRESS_PROBLEMS = 64


def make_model() -> BlockCausalModel:
    """The untrained model, of the sizes of llada-tiny."""
    from vllm_dlm.training.block_causal import make_block_causal
    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape

    shape = LLaDAShape(vocab_size=tokenizer.VOCAB_SIZE, max_sequence_length=MAX_LENGTH)
    return make_block_causal(shape, BLOCK_LENGTH)


def batch_loss(
    forward: Callable[..., Any], streams: Streams, block_length: int
) -> torch.Tensor:
    """Weighted sum of the cross-entropy at the masks of a batch, a scalar."""
    import torch
    import torch.nn.functional as F

    with torch.autocast("cpu", torch.bfloat16):
        logits = forward(streams.inputs, streams.positions, streams.seen(block_length))
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), streams.targets.flatten(), reduction="none"
    )
    return (losses * streams.weights.flatten()).sum()


def train(output_dir: str | Path, options: LoopOptions) -> bool:
    """Train the model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint `training.pt`.
        options: How to run.
    """
    prepare(options)
    import torch

    from vllm_dlm.training.block_causal import export_block_causal
    from vllm_dlm.training.streams import TwoStreams
    from vllm_dlm.training.tiny.sdar_data import make_batch
    from vllm_dlm.training.tiny.sdar_evaluation import evaluate_model

    model = make_model().train()

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        block_length = block_length_at(step, options.steps)
        return batch_loss(
            forward, make_batch(step, options.seed, block_length), block_length
        )

    def evaluate(step: int) -> dict[str, float]:
        model.attention_block = block_length_at(step - 1, options.steps)
        shares = evaluate_model(model, NUM_PROGRESS_PROBLEMS, seed=step)
        model.attention_block = BLOCK_LENGTH
        return shares

    done = run_steps(output_dir, options, TwoStreams(model), step_loss, evaluate)
    if done:
        export_block_causal(model, output_dir, torch.bfloat16)
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train sdar-tiny`."""
    add_model_arguments(parser, NAME)
    add_loop_arguments(parser, steps=STEPS)


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    from vllm_dlm.training.tiny.sdar_card import write_card

    if not trained(args, lambda: train(args.output_dir, LoopOptions.from_args(args))):
        return
    print(write_card(args.output_dir, args.num_problems))
