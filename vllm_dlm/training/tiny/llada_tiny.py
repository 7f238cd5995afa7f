# SPDX-License-Identifier: Apache-2.0
"""Train the built-in model llada-tiny: `vllm-dlm train llada-tiny`.

Masked diffusion on generated tasks (LLaDA, arXiv 2502.09992), on a CPU.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import sample_problem
from vllm_dlm.training.arguments import add_model_arguments, check_model_arguments
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_steps,
)

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel

STEPS = 12_000
# Token budget of a batch: short rows come in larger batches.
BATCH_TOKENS = 3072
# The row is prompt plus canvas, without padding: the canvas takes what the prompt
# leaves. Short rows are cheap, so that most of the learning happens on them.
SHORT_ROWS = (44, 48, 56, 64)
LONG_ROWS = (64, 96, 128, 160, 224, 288)
LONG_SHARE_EARLY, LONG_SHARE_LATE = 0.02, 0.35
LATE_PHASE = 0.55
# <|endoftext|> right after the answer counts like an answer token, the rest of the
# padding hardly: it is learnt at once and would drown the answers.
NUM_FULL_EOS = 2
PADDING_WEIGHT = 0.05
NUM_PROGRESS_PROBLEMS = 120


def make_batch(step: int, total_steps: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Token ids, masked token ids and loss weights [rows, length] of a step."""
    import torch

    rng = random.Random(f"llada-tiny-{seed}-{step}")
    late = step >= LATE_PHASE * total_steps
    is_long = rng.random() < (LONG_SHARE_LATE if late else LONG_SHARE_EARLY)
    length = rng.choice(LONG_ROWS if is_long else SHORT_ROWS)
    num_rows = BATCH_TOKENS // length
    eos = tokenizer.EOS_ID
    ids = torch.full((num_rows, length), eos)
    # Where the prompt ends, and where the answer with its first <|endoftext|> ends.
    starts, ends = [], []
    for row in range(num_rows):
        problem = sample_problem(rng)
        prompt = tokenizer.encode_prompt(problem.question, rng.random() < 0.5)
        tokens = prompt + tokenizer.encode(problem.answer)
        ids[row, : len(tokens)] = torch.tensor(tokens)
        starts.append(len(prompt))
        ends.append(len(tokens) + NUM_FULL_EOS)
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    position = torch.arange(length)
    in_canvas = position >= torch.tensor(starts)[:, None]
    in_padding = position >= torch.tensor(ends)[:, None]

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    # Half of the rows have all the padding masked, as while decoding, where the
    # blocks to the right are not begun; a tenth has the whole answer masked.
    answer_ratio = 0.02 + 0.98 * uniform(num_rows, 1)
    answer_ratio[uniform(num_rows, 1) < 0.1] = 1.0
    padding_ratio = uniform(num_rows, 1)
    padding_ratio[uniform(num_rows, 1) < 0.5] = 1.0
    ratio = torch.where(in_padding, padding_ratio, answer_ratio)
    masked = (uniform(num_rows, length) < ratio) & in_canvas
    weights = masked * torch.where(in_padding, PADDING_WEIGHT, 1.0)
    return ids, ids.masked_fill(masked, tokenizer.MASK_ID), weights


def make_model() -> LLaDAModel:
    """The untrained model."""
    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

    return LLaDAModel(LLaDAShape(vocab_size=tokenizer.VOCAB_SIZE))


def train(output_dir: str | Path, options: LoopOptions) -> bool:
    """Train the model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint `training.pt`.
        options: How to run.
    """
    prepare(options)
    import torch
    import torch.nn.functional as F

    from vllm_dlm.training.tiny.export import export
    from vllm_dlm.training.tiny.llada_evaluation import evaluate_model

    model = make_model()

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        ids, inputs, weights = make_batch(step, options.steps, options.seed)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(inputs)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), ids.flatten(), reduction="none"
        )
        return (losses * weights.flatten()).sum() / weights.sum()

    def evaluate_step(step: int) -> dict[str, float]:
        return evaluate_model(model, NUM_PROGRESS_PROBLEMS, canvas=32, seed=step)

    done = run_steps(output_dir, options, model, step_loss, evaluate_step)
    if done:
        export(model, output_dir)
    return done


def evaluate(
    model_dir: str | Path,
    num_problems: int = 500,
    canvas: int = 64,
    block_length: int = 32,
    tokens_per_step: int = 1,
) -> dict[str, float]:
    """Exact match per task of an exported model on held-out problems, and "all".

    Args:
        model_dir: Folder of the exported model.
        num_problems: Number of held-out problems.
        canvas: Number of tokens generated for each.
        block_length: Length of a block.
        tokens_per_step: Tokens committed per forward pass.
    """
    from vllm_dlm.training.tiny.llada_evaluation import evaluate_model
    from vllm_dlm.training.tiny.llada_modeling import load_llada

    return evaluate_model(
        load_llada(model_dir),
        num_problems,
        canvas=canvas,
        block_length=block_length,
        tokens_per_step=tokens_per_step,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train llada-tiny`."""
    add_model_arguments(parser, "llada-tiny")
    add_loop_arguments(parser, steps=STEPS)


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    from vllm_dlm.training.tiny.llada_card import write_card

    check_model_arguments(args)
    done = args.skip_training or train(args.output_dir, LoopOptions.from_args(args))
    if not done:
        print(f"Stopped before the last step; run again to go on: {args.output_dir}")
        return
    print(write_card(args.output_dir, args.num_problems, PADDING_WEIGHT))


def main() -> None:
    """Entry point of `python -m vllm_dlm.training.tiny.llada_tiny`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
