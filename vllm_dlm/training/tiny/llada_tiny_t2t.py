# SPDX-License-Identifier: Apache-2.0
"""Train llada-tiny further, to edit: `vllm-dlm train llada-tiny-t2t`.

It learns from what it has written itself (`edit_data`), for the strategy `joint`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks.problems import FREE_TASKS
from vllm_dlm.training.arguments import add_model_arguments, trained
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_steps,
)

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel

NAME, START = "llada-tiny-t2t", "llada-tiny"
STEPS = 4000
SCALE = 0.7
MAX_CANVAS = 256
DECODING: dict[str, Any] = {
    "strategy": "joint",
    "strategy_config": {"mask_threshold": 0.0, "edit_threshold": 0.0},
}
# While training: held-out problems of each evaluation, and steps between two.
NUM_PROGRESS_PROBLEMS, EVAL_STEPS = 120, 250


def train(
    output_dir: str | Path, options: LoopOptions, start: str | Path = START
) -> bool:
    """Train the model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint `training.pt`.
        options: How to run.
        start: Folder or alias of the model to go on with, in llada-tiny's tokens.

    Raises:
        ValueError: the model in `start` cannot be read.
    """
    prepare(options)
    import torch

    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.config.levels import config_entries
    from vllm_dlm.tasks.evaluation import exact_match
    from vllm_dlm.training.tiny.edit_data import make_batches
    from vllm_dlm.training.tiny.export import export
    from vllm_dlm.training.tiny.llada_modeling import load_llada
    from vllm_dlm.training.tiny.masking import batch_loss

    model = load_llada(resolve(str(start))).train()

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        return batch_loss(forward, make_batches(forward, step, options.seed))

    def evaluate_step(step: int) -> dict[str, float]:
        model.eval()

        def decode(prompts: list[list[int]]) -> list[list[int]]:
            return write_and_edit(model, prompts)

        shares = exact_match(
            decode, NUM_PROGRESS_PROBLEMS, seed=step, tasks=list(FREE_TASKS)
        )
        model.train()
        return shares

    done = run_steps(output_dir, options, model, step_loss, evaluate_step, scale=SCALE)
    if done:
        export(
            model,
            output_dir,
            max_canvas=MAX_CANVAS,
            dtype=torch.bfloat16,
            more=config_entries(DECODING),
        )
    return done


def write_and_edit(
    model: LLaDAModel, prompts: list[list[int]], *, canvas: int = 32, edits: int = 2
) -> list[list[int]]:
    """Canvas token ids of each prompt, written in one forward, edited by others.

    That is `joint` with both thresholds 0 and the canvas one block.

    Args:
        model: The model.
        prompts: Token ids of the prompts.
        canvas: Number of tokens to generate.
        edits: Forwards that edit.
    """
    import torch

    from vllm_dlm.tasks import tokenizer

    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    ids = torch.full((len(prompts), int(starts.max()) + canvas), tokenizer.MASK_ID)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    places = torch.arange(ids.shape[1])
    valid = places < starts + canvas
    for _ in range(1 + edits):
        with torch.no_grad():
            logits = model(ids, valid)
        logits[..., tokenizer.MASK_ID] = -torch.inf
        ids = torch.where(places < starts, ids, logits.argmax(-1))
    columns = starts + torch.arange(canvas)
    return ids.gather(1, columns).tolist()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train llada-tiny-t2t`."""
    add_model_arguments(parser, NAME)
    add_loop_arguments(parser, steps=STEPS)
    parser.add_argument(
        "--start",
        metavar="MODEL",
        default=START,
        help="folder or alias of the model to go on with, in llada-tiny's tokens",
    )


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""

    def go_on() -> bool:
        options = replace(LoopOptions.from_args(args), eval_steps=EVAL_STEPS)
        return train(args.output_dir, options, args.start)

    if not trained(args, go_on):
        return
    from vllm_dlm.training.tiny.t2t_card import write_card

    recipe = {"max_canvas": MAX_CANVAS, "scale": SCALE, **DECODING["strategy_config"]}
    print(write_card(args.output_dir, args.num_problems, recipe))
