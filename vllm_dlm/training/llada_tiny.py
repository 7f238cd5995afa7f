# SPDX-License-Identifier: Apache-2.0
"""Train the built-in model llada-tiny: `vllm-dlm train llada-tiny`.

Masked diffusion on generated tasks (LLaDA, arXiv 2502.09992), on a CPU. The batch
and the learning rate of a step depend on the seed and the step alone, so that an
interrupted run continues as if nothing had happened.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dlm.training import tasks as tiny_tasks
from vllm_dlm.training import tokenizer as tiny_tokenizer

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.modeling import LLaDAModel

SEED = 1
STEPS = 12_000
MUON_LEARNING_RATE = 3e-3
ADAM_LEARNING_RATE = 2e-3
WARMUP_STEPS = 200
# Warm-up, constant, then a fall to zero over the last part of the steps.
DECAY_SHARE = 0.65
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
    eos = tiny_tokenizer.EOS_ID
    ids = torch.full((num_rows, length), eos)
    # Where the prompt ends, and where the answer with its first <|endoftext|> ends.
    starts, ends = [], []
    for row in range(num_rows):
        problem = tiny_tasks.sample_problem(rng)
        prompt = tiny_tokenizer.encode_prompt(problem.question, rng.random() < 0.5)
        tokens = prompt + tiny_tokenizer.encode(problem.answer)
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
    return ids, ids.masked_fill(masked, tiny_tokenizer.MASK_ID), weights


def learning_rate_factor(step: int, total_steps: int) -> float:
    """Share of the full learning rate: warm-up, constant, then linear to zero."""
    decay_steps = DECAY_SHARE * total_steps
    return min(1.0, (step + 1) / WARMUP_STEPS, (total_steps - step) / decay_steps)


def make_model() -> LLaDAModel:
    """The untrained model."""
    from vllm_dlm.training.modeling import LLaDAModel, LLaDAShape

    return LLaDAModel(LLaDAShape(vocab_size=tiny_tokenizer.VOCAB_SIZE))


def make_optimizers(model: LLaDAModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    import torch

    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_layer = parameter.dim() == 2 and ".blocks." in name
        (matrices if in_layer else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=MUON_LEARNING_RATE,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=ADAM_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]


def train(
    output_dir: str | Path,
    *,
    steps: int = STEPS,
    seed: int = SEED,
    resume: bool = True,
    threads: int | None = None,
    compile_model: bool | None = None,
    max_minutes: float | None = None,
    checkpoint_minutes: float = 3.0,
    eval_steps: int = 500,
) -> bool:
    """Train the model and export it to `output_dir`; False if stopped before.

    Args:
        output_dir: Folder of the model and of the checkpoint `training.pt`.
        steps: Number of optimizer steps; the schedules depend on it.
        seed: Seed of the weights and of the problems.
        resume: Go on from the checkpoint, if there is one.
        threads: CPU threads; PyTorch's choice by default.
        compile_model: Use torch.compile, which takes half a minute and then needs
            half the time; by default where there is a C++ compiler.
        max_minutes: Stop (resumably) after this time.
        checkpoint_minutes: Time between two checkpoints.
        eval_steps: Steps between two evaluations on held-out problems.
    """
    # Threads that spin while they wait lose all speed on a busy machine. This has an
    # effect only if nobody has loaded OpenMP before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    from vllm_dlm.training.evaluation import evaluate_model
    from vllm_dlm.training.export import export

    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = output_dir / "training.pt"
    model = make_model()
    optimizers = make_optimizers(model)
    full_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, seconds = 0, 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["seed"] != seed:
            raise ValueError(f"{checkpoint} has seed {state['seed']}, not {seed}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "seconds": seconds + time.monotonic() - started,
            "seed": seed,
        }
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, checkpoint)

    started = last_save = time.monotonic()
    if compile_model is None:
        compile_model = bool(shutil.which("g++") or shutil.which("clang++"))
    forward = torch.compile(model, dynamic=True) if compile_model else model
    progress = tqdm(total=steps, initial=step, unit="step", mininterval=10)
    mean_loss, accuracy = None, 0.0
    while step < steps:
        ids, inputs, weights = make_batch(step, steps, seed)
        factor = learning_rate_factor(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(inputs)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), ids.flatten(), reduction="none"
        )
        loss = (losses * weights.flatten()).sum() / weights.sum()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, full_rate in zip(optimizers, full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = factor * full_rate
            optimizer.step()
        step += 1
        value = loss.item()
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        progress.update()
        if step % 20 == 0:
            progress.set_postfix(
                loss=f"{mean_loss:.3f}", exact=f"{accuracy:.2f}", refresh=False
            )
        if step % eval_steps == 0 or step == steps:
            table = evaluate_model(model, NUM_PROGRESS_PROBLEMS, canvas=32, seed=step)
            accuracy = table.pop("all")
            cells = " ".join(f"{task} {share:.2f}" for task, share in table.items())
            progress.write(
                f"step {step} loss {mean_loss:.4f} exact {accuracy:.3f}: {cells}"
            )
        now = time.monotonic()
        if now - last_save > 60 * checkpoint_minutes:
            save()
            last_save = now
        if max_minutes and now - started > 60 * max_minutes:
            break
    progress.close()
    save()
    if step == steps:
        export(model, output_dir)
    return step == steps


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
    from vllm_dlm.training.evaluation import evaluate_model, load_model

    return evaluate_model(
        load_model(model_dir),
        num_problems,
        canvas=canvas,
        block_length=block_length,
        tokens_per_step=tokens_per_step,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train llada-tiny`."""
    parser.add_argument(
        "--output-dir", default="llada-tiny", help="folder of the model"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the run")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile; by default where there is a C++ compiler",
    )
    parser.add_argument(
        "--max-minutes", type=float, help="stop after this time; resume later"
    )
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="start anew even if the folder holds a checkpoint",
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=500,
        help="held-out problems for the accuracy in the model card",
    )
    parser.add_argument(
        "--skip-training",
        action="store_true",
        help="only evaluate the model in the folder and write its card",
    )


def run(args: argparse.Namespace) -> None:
    """Train, export, evaluate and write the model card."""
    from vllm_dlm.training.model_card import write_card

    done = args.skip_training or train(
        args.output_dir,
        steps=args.steps,
        seed=args.seed,
        resume=args.resume,
        threads=args.threads,
        compile_model=args.compile,
        max_minutes=args.max_minutes,
    )
    if not done:
        print(f"Stopped before the last step; run again to go on: {args.output_dir}")
        return
    print(write_card(args.output_dir, args.num_problems))


def main() -> None:
    """Entry point of `python -m vllm_dlm.training.llada_tiny`."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
