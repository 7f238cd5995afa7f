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

from vllm_dlm.training import tokenizer as tiny_tokenizer
from vllm_dlm.training.deer_data import ALPHA, Recipe, make_batch
from vllm_dlm.training.loop import (
    LoopOptions,
    add_loop_arguments,
    prepare,
    run_steps,
)

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.modeling import LLaDAModel, LLaDAShape

NAME = "deer-tiny"
STEPS = 2000
STAGE_ONE_SHARE = 0.7
"""Of the steps."""
NUM_PROMPTS = 30_000
NUM_PROGRESS_PROMPTS = 120
# Of the learning rates, where a drafter goes on from weights that it already has.
FINE_TUNING_SCALE = 0.3


def draft_greedy(
    model: LLaDAModel, prefixes: list[list[int]], width: int, mask_id: int
) -> list[list[int]]:
    """`width` tokens behind each prefix, from one denoising step."""
    import torch

    ends = torch.tensor([len(prefix) for prefix in prefixes])
    length = int(ends.max()) + width
    ids = torch.full((len(prefixes), length), mask_id)
    for row, prefix in enumerate(prefixes):
        ids[row, : len(prefix)] = torch.tensor(prefix)
    valid = torch.arange(length) < ends[:, None] + width
    device = next(model.parameters()).device
    columns = ends[:, None] + torch.arange(width)
    with torch.inference_mode():
        logits = model(ids.to(device), valid.to(device)).cpu()
        logits[:, :, mask_id] = float("-inf")
        return logits.argmax(-1).gather(1, columns).tolist()


def kept_prompts(count: int) -> int:
    """How many of the first prompts are kept out of the training, to measure on."""
    return min(NUM_PROGRESS_PROMPTS, max(1, count // 10))


def make_shape() -> LLaDAShape:
    """Sizes of deer-tiny: as many parameters as llama-tiny-draft, but one more layer.

    One step has to say what the draft model says in many, so that depth is worth more.
    """
    from vllm_dlm.training.modeling import LLaDAShape

    return LLaDAShape(
        vocab_size=tiny_tokenizer.VOCAB_SIZE,
        d_model=96,
        n_layers=3,
        n_heads=3,
        mlp_hidden_size=128,
    )


def train(
    output_dir: str | Path,
    options: LoopOptions,
    *,
    target: str = "llama-tiny",
    drafter: str | None = None,
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
        drafter: Folder or alias of a model of LLaDA's layout to start from; None
            starts a fresh one of `make_shape`.
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

    from vllm_dlm.aliases import resolve
    from vllm_dlm.training.acceptance import measure_acceptance
    from vllm_dlm.training.export import export, export_like
    from vllm_dlm.training.teacher import (
        Answered,
        end_token_ids,
        load_causal_lm,
        recorded_answers,
    )

    if drafter is None:
        scale = 1.0 if scale is None else scale
        model, mask_id = _fresh_drafter(target)
    else:
        scale = FINE_TUNING_SCALE if scale is None else scale
        model, mask_id = _existing_drafter(target, drafter)
    teacher = load_causal_lm(target, device)
    model.to(device)
    recipe = Recipe(
        mask_id=mask_id,
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
            lambda prefixes: draft_greedy(model, prefixes, block_length, mask_id), shown
        )
        model.train()
        return {
            "accepted per draft": acceptance.accepted_per_round,
            "all": acceptance.accepted / acceptance.tokens,
        }

    done = run_steps(output_dir, options, model, step_loss, evaluate, scale=scale)
    if done and drafter is None:
        export(model, output_dir)
    elif done and drafter is not None:
        export_like(model, resolve(drafter), output_dir)
    return done


def _fresh_drafter(target: str) -> tuple[LLaDAModel, int]:
    from vllm_dlm.training.modeling import LLaDAModel
    from vllm_dlm.training.teacher import load_tokenizer

    if load_tokenizer(target).get_vocab() != tiny_tokenizer.TOKEN_IDS:
        raise ValueError(
            f"a fresh drafter has the tokenizer of llama-tiny, and {target} another; "
            "pass a diffusion model that has the target's with --drafter"
        )
    return LLaDAModel(make_shape()), tiny_tokenizer.MASK_ID


def _existing_drafter(target: str, drafter: str) -> tuple[LLaDAModel, int]:
    import json

    from vllm_dlm.aliases import resolve
    from vllm_dlm.training.evaluation import load_model
    from vllm_dlm.training.teacher import check_same_vocabulary

    folder = Path(resolve(drafter))
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(
                f"--drafter {drafter}: there is no {folder / name}; expected a folder "
                "in LLaDA's layout with its weights in one file"
            )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llada":
        raise ValueError(
            f"--drafter {drafter} is a {config.get('model_type')!r}; this command "
            "trains models of LLaDA's layout ('llada')"
        )
    check_same_vocabulary(target, drafter)
    return load_model(folder).train(), config["mask_token_id"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train deer`."""
    from vllm_dlm.training.llama_tiny import add_shared_arguments

    add_shared_arguments(parser, NAME)
    parser.add_argument(
        "--target",
        default="llama-tiny",
        help="the autoregressive model to draft for: folder, hub id or alias",
    )
    parser.add_argument(
        "--drafter",
        help="folder or alias of a diffusion model in LLaDA's layout to start from, "
        "with the target's tokenizer; by default a fresh, very small one",
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
    from vllm_dlm.training.llama_card import write_drafter_card
    from vllm_dlm.training.llama_tiny import check_shared_arguments

    check_shared_arguments(args)
    done = args.skip_training or train(
        args.output_dir,
        LoopOptions.from_args(args),
        target=args.target,
        drafter=args.drafter,
        prompts=args.prompts,
        num_prompts=args.num_prompts,
        max_tokens=args.max_tokens,
        block_length=args.block_length,
        alpha=args.alpha,
        scale=args.learning_rate_scale,
        device=args.device,
    )
    if not done:
        print(f"Stopped before the last step; run again to go on: {args.output_dir}")
        return
    print(write_drafter_card(args))
