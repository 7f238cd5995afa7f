# SPDX-License-Identifier: Apache-2.0
"""Train the built-in model llada-tiny: `vllm-dlm train llada-tiny`.

Masked diffusion on generated tasks (LLaDA, arXiv 2502.09992), on a CPU.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import sample_problem
from vllm_dlm.training.arguments import add_model_arguments, trained
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    learning_rate_factor,
    prepare,
    run_steps,
)

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel
    from vllm_dlm.training.tiny.masking import Batch

# The first phase learns the tasks on short rows, the second one the long canvases.
SHORT_STEPS, LONG_STEPS = 12_000, 700
STEPS = SHORT_STEPS + LONG_STEPS
# Token budget of a batch: short rows come in larger batches.
BATCH_TOKENS = 3072
# The row is prompt plus canvas, without padding: the canvas takes what the prompt
# leaves. Short rows are cheap, so that most of the learning happens on them.
SHORT_ROWS = (44, 48, 56, 64)
MIDDLE_ROWS = (64, 96, 128, 160, 224, 288)
MIDDLE_SHARE_EARLY, MIDDLE_SHARE_LATE = 0.02, 0.35
LATE_PHASE = 0.55
# In the second phase, each step has half a batch of rows of the first phase, so that
# nothing is forgotten, and as many tokens, or a row more, in long rows.
LONGEST_CANVAS = 1024
LONGEST_ROW = LONGEST_CANVAS + 64
LONG_ROWS = tuple(range(128, LONGEST_ROW + 1, 64))
LONG_RATE = 0.5
# <|endoftext|> right after the answer counts like an answer token, the rest of the
# padding hardly: it is learnt at once and would drown the answers. In the second phase
# a row's whole padding counts no more than a few tokens do.
NUM_FULL_EOS = 2
PADDING_WEIGHT = 0.05
LONG_PADDING_SUM = 4.0
# While training: held-out problems of each evaluation, in the second phase fewer ones
# at a wide canvas.
NUM_PROGRESS_PROBLEMS = 120
NUM_LONG_PROBLEMS, LONG_CANVAS = 11, 512


def short_steps(total_steps: int) -> int:
    """How many of a run's steps are the first phase."""
    return total_steps * SHORT_STEPS // STEPS


def learning_rate(step: int, total_steps: int) -> float:
    """Share of the full learning rate: each phase warms up and falls to zero."""
    short = short_steps(total_steps)
    if step < short:
        return learning_rate_factor(step, short)
    return LONG_RATE * learning_rate_factor(step - short, total_steps - short)


def make_batches(step: int, total_steps: int, seed: int) -> list[Batch]:
    """What a step learns from: a batch, or in the second phase short rows and long."""
    rng = random.Random(f"llada-tiny-{seed}-{step}")
    short = short_steps(total_steps)
    late = step >= LATE_PHASE * short
    is_middle = rng.random() < (MIDDLE_SHARE_LATE if late else MIDDLE_SHARE_EARLY)
    length = rng.choice(MIDDLE_ROWS if is_middle else SHORT_ROWS)
    if step < short:
        return [make_batch(rng, BATCH_TOKENS // length, length)]
    # The longer a row, the more there is to learn: the longer of two draws.
    long = max(rng.choice(LONG_ROWS), rng.choice(LONG_ROWS))
    return [
        make_batch(rng, BATCH_TOKENS // 2 // length, length, LONG_PADDING_SUM),
        make_batch(rng, BATCH_TOKENS // 2 // long + 1, long, LONG_PADDING_SUM),
    ]


def make_batch(
    rng: random.Random, num_rows: int, length: int, padding_sum: float = math.inf
) -> Batch:
    """Rows of prompt, answer and padding, partly masked.

    Args:
        rng: Where problems, prompts' forms and masks are drawn from.
        num_rows: Number of rows.
        length: Their length.
        padding_sum: Most loss weight of a row's padding, were all of it masked.
    """
    import torch

    from vllm_dlm.training.tiny.masking import mask_canvas

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
    end = torch.tensor(ends)[:, None]
    in_padding = position >= end
    padding_weight = (padding_sum / (length - end).clamp(min=1)).clamp(
        max=PADDING_WEIGHT
    )
    in_canvas = position >= torch.tensor(starts)[:, None]
    return mask_canvas(
        ids, in_canvas, in_padding, padding_weight, tokenizer.MASK_ID, generator
    )


def make_model() -> LLaDAModel:
    """The untrained model."""
    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

    return LLaDAModel(
        LLaDAShape(vocab_size=tokenizer.VOCAB_SIZE, max_sequence_length=LONGEST_ROW)
    )


def train(
    output_dir: str | Path, options: LoopOptions, start: str | Path | None = None
) -> bool:
    """Train the model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint `training.pt`.
        options: How to run.
        start: Folder of a trained model with whose weights the run begins at the
            second phase, if there is no checkpoint.

    Raises:
        ValueError: the model in `start` is of other sizes, or damaged.
    """
    prepare(options)
    from vllm_dlm.files.model_folders import check_weights
    from vllm_dlm.training.tiny.export import export
    from vllm_dlm.training.tiny.llada_evaluation import evaluate_model
    from vllm_dlm.training.tiny.llada_modeling import load_llada
    from vllm_dlm.training.tiny.masking import batch_loss

    model = make_model()
    if start is not None:
        weights = load_llada(start).state_dict()
        check_weights(weights, model, start)
        model.load_state_dict(weights)
    short = short_steps(options.steps)

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        return batch_loss(forward, make_batches(step, options.steps, options.seed))

    def evaluate_step(step: int) -> dict[str, float]:
        if step <= short:
            return evaluate_model(model, NUM_PROGRESS_PROBLEMS, canvas=32, seed=step)
        return evaluate_model(model, NUM_LONG_PROBLEMS, canvas=LONG_CANVAS, seed=step)

    done = run_steps(
        output_dir,
        options,
        model,
        step_loss,
        evaluate_step,
        rate=learning_rate,
        first_step=0 if start is None else short,
    )
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
    parser.add_argument(
        "--start",
        metavar="FOLDER",
        help="begin at the second phase, that of the long rows, with the weights of "
        "the model in this folder, unless there is a checkpoint to go on from",
    )


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    from vllm_dlm.training.tiny.llada_card import write_card

    if args.skip_training and args.start:
        raise ValueError("--start: with --skip-training nothing is trained")
    if not trained(
        args,
        lambda: train(args.output_dir, LoopOptions.from_args(args), args.start),
    ):
        return
    short = short_steps(args.steps)
    recipe = {
        "padding_weight": PADDING_WEIGHT,
        "short_steps": short,
        "long_steps": args.steps - short,
        "longest_row": LONGEST_ROW,
        "long_padding": LONG_PADDING_SUM,
        "longest_canvas": LONGEST_CANVAS,
    }
    print(write_card(args.output_dir, args.num_problems, recipe))


def main() -> None:
    """Entry point of `python -m vllm_dlm.training.tiny.llada_tiny`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
