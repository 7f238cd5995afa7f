# SPDX-License-Identifier: Apache-2.0
"""Train the built-in target llama-tiny: `vllm-dlm train llama-tiny`.

An autoregressive Llama on the tasks of llada-tiny, for the methods in which a
diffusion model, a smaller model or the model's own lower layers draft for it. Every
layer learns to be read out, as in LayerSkip (arXiv 2404.16710): the loss of an exit
counts the more the higher it is. Without LayerSkip's layer dropout and without its
curriculum, which a model of eight layers does not need to learn these tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.arguments import add_model_arguments, trained
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_steps,
)
from vllm_dlm.training.tiny.llama_data import MAX_ANSWER_TOKENS, make_batch

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape
    from vllm_dlm.training.tiny.llama_modeling import LlamaModel

NAME = "llama-tiny"
STEPS = 2500
# Loss of all exits below the last layer together; the last layer's is 1.
EXIT_WEIGHT = 0.7
NUM_PROGRESS_PROBLEMS = 120


def make_shape() -> LLaDAShape:
    """Sizes of llama-tiny."""
    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape

    return LLaDAShape(vocab_size=tokenizer.VOCAB_SIZE, n_layers=8, mlp_hidden_size=256)


def exit_loss(
    model: LlamaModel,
    forward: Callable[..., Any],
    ids: torch.Tensor,
    weights: torch.Tensor,
    exit_weight: float,
) -> torch.Tensor:
    """Next-token loss of the last layer plus `exit_weight` times that of the exits.

    Args:
        model: The model, for its head.
        forward: The model or its compiled form.
        ids: Token ids [rows, length].
        weights: Loss weights [rows, length - 1].
        exit_weight: Weight of all layers below the last together; layer l of L gets
            a share proportional to l.
    """
    import torch
    import torch.nn.functional as F

    counted = weights > 0
    with torch.autocast("cpu", torch.bfloat16):
        hidden = forward(ids[:, :-1])
        num_layers = hidden.shape[0]
        if exit_weight == 0:
            hidden = hidden[-1:]
        logits = model.head(hidden[:, counted])
    targets = ids[:, 1:][counted].expand(logits.shape[0], -1)
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view(targets.shape)
    kept = weights[counted]
    by_layer = (losses * kept).sum(1) / kept.sum()
    if exit_weight == 0:
        return by_layer[-1]
    shares = torch.arange(1.0, num_layers)
    exits = (by_layer[:-1] * shares).sum() / shares.sum()
    return by_layer[-1] + exit_weight * exits


def train(
    output_dir: str | Path,
    options: LoopOptions,
    *,
    name: str,
    shape: LLaDAShape,
    exit_weight: float,
) -> bool:
    """Train a causal model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint.
        options: How to run.
        name: Part of the seed of the batches.
        shape: Sizes of the model.
        exit_weight: Weight of the exits' loss, 0 for none.

    Raises:
        ValueError: `exit_weight` is negative.
    """
    if exit_weight < 0:
        raise ValueError(f"exit_weight must be 0 or more, not {exit_weight}")
    prepare(options)
    from vllm_dlm.tasks.evaluation import exact_match
    from vllm_dlm.training.tiny.llama_modeling import (
        LlamaModel,
        decode_greedy,
        export_llama,
    )

    model = LlamaModel(shape)

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        ids, weights = make_batch(name, step, options.seed)
        return exit_loss(model, forward, ids, weights, exit_weight)

    def evaluate(step: int) -> dict[str, float]:
        model.eval()

        def decode(prompts: list[list[int]]) -> list[list[int]]:
            return decode_greedy(
                model,
                prompts,
                max_tokens=MAX_ANSWER_TOKENS,
                exit_layer=model.shape.n_layers,
            )

        shares = exact_match(decode, NUM_PROGRESS_PROBLEMS, seed=step)
        model.train()
        return shares

    done = run_steps(output_dir, options, model, step_loss, evaluate)
    if done:
        export_llama(model.eval(), output_dir)
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train llama-tiny`."""
    add_model_arguments(parser, NAME)
    parser.add_argument(
        "--exit-weight",
        type=float,
        default=EXIT_WEIGHT,
        help="weight of the loss of the exits below the last layer; 0 for none",
    )
    add_loop_arguments(parser, steps=STEPS)


def train_and_describe(
    args: argparse.Namespace, *, name: str, shape: LLaDAShape, exit_weight: float
) -> None:
    """Train a causal model, export it, evaluate it and write its card."""

    def go_on() -> bool:
        return train(
            args.output_dir,
            LoopOptions.from_args(args),
            name=name,
            shape=shape,
            exit_weight=exit_weight,
        )

    if not trained(args, go_on):
        return
    from vllm_dlm.training.tiny.llama_card import write_card

    print(write_card(args.output_dir, name, args.num_problems, exit_weight))


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    train_and_describe(
        args, name=NAME, shape=make_shape(), exit_weight=args.exit_weight
    )
