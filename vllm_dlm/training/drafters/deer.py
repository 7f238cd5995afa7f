# SPDX-License-Identifier: Apache-2.0
"""Train a diffusion drafter for an autoregressive target: `vllm-dlm train deer`.

DEER (arXiv 2512.15176), reconstructed from the paper: no code is public. The drafter
learns from the target's own answers, in two stages (`deer_data`), to write what the
target writes behind any text, in one denoising step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_dlm.training.arguments import add_model_arguments, trained
from vllm_dlm.training.drafters.deer_data import (
    ALPHA,
    STAGE_ONE_SHARE,
    Recipe,
    kept_prompts,
    make_batch,
)
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_steps,
)

if TYPE_CHECKING:
    import torch

NAME = "deer-tiny"
STEPS = 2000
NUM_PROMPTS = 30_000
# Of the learning rates, where a drafter goes on from weights that it already has.
FINE_TUNING_SCALE = 0.3


def train(
    output_dir: str | Path,
    options: LoopOptions,
    *,
    target: str = "llama-tiny",
    drafter: str | None = None,
    attention_block: int | None = None,
    prompts: str | Path | None = None,
    num_prompts: int = NUM_PROMPTS,
    max_tokens: int = 64,
    block_length: int = 32,
    alpha: float = ALPHA,
    scale: float | None = None,
    device: str = "cpu",
) -> bool:
    """Train a drafter and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the drafter, of the answers and of the checkpoint.
        options: How to run.
        target: Folder, hub id or alias of an autoregressive model.
        drafter: Folder or alias of a model in the layout of LLaDA or SDAR to start
            from; None starts a fresh one of `drafters.SHAPE`.
        attention_block: Tokens per block of a fresh drafter that is block-causal;
            None: it attends both ways, in LLaDA's layout.
        prompts: File of prompts; None asks the built-in tasks.
        num_prompts: Most prompts.
        max_tokens: Most tokens of an answer.
        block_length: Masks behind a text, as it will be served.
        alpha: Base of stage II's weights.
        scale: Factor of the learning rates; 1 for a fresh drafter, else 0.3.
        device: Of both models, as PyTorch names it.

    Raises:
        ValueError: models or prompts that do not fit, or a value out of its range.
    """
    prepare(options)
    import torch
    import torch.nn.functional as F

    from vllm_dlm.training.drafters.acceptance import measure_acceptance
    from vllm_dlm.training.drafters.networks import load_drafter, make_drafter
    from vllm_dlm.training.drafters.teacher import (
        Answered,
        check_same_vocabulary,
        end_token_ids,
        load_causal_lm,
        recorded_answers,
    )

    if drafter is None:
        learner = make_drafter(target, attention_block)
    elif attention_block is None:
        learner = load_drafter(drafter)
        check_same_vocabulary(target, drafter)
    else:
        raise ValueError(
            "--attention-block is for a fresh drafter; how one of --drafter attends is "
            "a part of it"
        )
    if scale is None:
        scale = 1.0 if drafter is None else FINE_TUNING_SCALE
    model = learner.network.train()
    teacher = load_causal_lm(target, device)
    model.to(device)
    recipe = Recipe(
        mask_id=learner.mask_id,
        end_id=end_token_ids(teacher)[0],
        stage_one_steps=round(STAGE_ONE_SHARE * options.steps),
        block_length=block_length,
        alpha=alpha,
    )
    answered = recorded_answers(
        Path(output_dir) / "answers.json",
        teacher,
        target,
        prompts=prompts,
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        seed=options.seed,
        reuse=options.resume,
    )
    kept = kept_prompts(len(answered.prompts))
    shown = Answered(answered.prompts[:kept], answered.answers[:kept])
    taught = Answered(answered.prompts[kept:], answered.answers[kept:])
    if not taught.prompts:
        raise ValueError("a drafter needs at least 2 prompts to learn from")

    def step_loss(forward: Callable[..., Any], step: int) -> torch.Tensor:
        ids, inputs, valid, weights = (
            tensor.to(device)
            for tensor in make_batch(taught, step, options.seed, recipe)
        )
        with torch.autocast(teacher.device.type, torch.bfloat16):
            logits = forward(inputs, valid)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), ids.flatten(), reduction="none"
        )
        return (losses * weights.flatten()).sum() / weights.sum()

    def evaluate(step: int) -> dict[str, float]:
        model.eval()
        acceptance = measure_acceptance(
            lambda prefixes: learner.draft(prefixes, block_length), shown
        )
        model.train()
        return {
            "accepted per draft": acceptance.accepted_per_round,
            "all": acceptance.accepted / acceptance.tokens,
        }

    done = run_steps(output_dir, options, model, step_loss, evaluate, scale=scale)
    if done:
        learner.save(output_dir, drafter, block_length)
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train deer`."""
    add_model_arguments(parser, NAME)
    parser.add_argument(
        "--target",
        default="llama-tiny",
        help="the autoregressive model to draft for: folder, hub id or alias",
    )
    parser.add_argument(
        "--drafter",
        help="folder or alias of a diffusion model in the layout of LLaDA or SDAR to "
        "start from, with the target's tokenizer; by default a fresh, very small one",
    )
    parser.add_argument(
        "--attention-block",
        type=int,
        metavar="B",
        help="a fresh drafter that is block-causal, in SDAR's layout: a token sees its "
        "block of B tokens and those left of it, so that serving keeps the text's keys "
        "(context 'cached'); by default it attends both ways, in LLaDA's layout",
    )
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
        "--block-length",
        type=int,
        default=32,
        help="masks behind a text, as it will be served (num_speculative_tokens)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=ALPHA,
        help="base of stage II's weights (the paper: 1.02 is noisy, 1.05 diverges)",
    )
    parser.add_argument(
        "--learning-rate-scale",
        type=float,
        help="factor of the learning rates; by default 1 for a fresh drafter and "
        f"{FINE_TUNING_SCALE} with --drafter",
    )
    parser.add_argument(
        "--device", default="cpu", help="of both models, as PyTorch names it (cpu)"
    )
    add_loop_arguments(parser, steps=STEPS)


def run(args: argparse.Namespace) -> None:
    """Train, export, measure the acceptance and write the model card."""

    def go_on() -> bool:
        return train(
            args.output_dir,
            LoopOptions.from_args(args),
            target=args.target,
            drafter=args.drafter,
            attention_block=args.attention_block,
            prompts=args.prompts,
            num_prompts=args.num_prompts,
            max_tokens=args.max_tokens,
            block_length=args.block_length,
            alpha=args.alpha,
            scale=args.learning_rate_scale,
            device=args.device,
        )

    if not trained(args, go_on):
        return
    from vllm_dlm.training.drafters.deer_card import write_card

    print(write_card(args))
