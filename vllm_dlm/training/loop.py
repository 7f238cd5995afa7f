# SPDX-License-Identifier: Apache-2.0
"""The loop that trains the built-in models on a CPU: resumable, with a progress bar.

What a step computes may depend on the seed and the step alone, so that an interrupted
run continues as if nothing had happened.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.distributed import Processes

MUON_LEARNING_RATE = 3e-3
ADAM_LEARNING_RATE = 2e-3
WARMUP_STEPS = 200
# Warm-up, constant, then a fall to zero over the last part of the steps.
DECAY_SHARE = 0.65


@dataclass(frozen=True)
class LoopOptions:
    """How a training run is carried out.

    Args:
        steps: Number of optimizer steps; the schedules depend on it.
        seed: Seed of the weights and of the batches.
        resume: Go on from the checkpoint `training.pt`, if there is one.
        threads: CPU threads; PyTorch's choice by default.
        compile_model: Use torch.compile, which takes half a minute and then needs
            half the time; by default where there is a C++ compiler.
        max_minutes: Stop (resumably) after this time.
        checkpoint_minutes: Time between two checkpoints.
        eval_steps: Steps between two evaluations on held-out problems.

    Raises:
        ValueError: a number is not positive.
    """

    steps: int
    seed: int = 1
    resume: bool = True
    threads: int | None = None
    compile_model: bool | None = None
    max_minutes: float | None = None
    checkpoint_minutes: float = 3.0
    eval_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "threads", "max_minutes", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, not {value}")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> LoopOptions:
        """The options that `add_loop_arguments` has added to a parser."""
        return cls(
            steps=args.steps,
            seed=args.seed,
            resume=args.resume,
            threads=args.threads,
            compile_model=args.compile,
            max_minutes=args.max_minutes,
        )


def add_loop_arguments(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """Add the options of a run; `steps` is the default of --steps."""
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=1, help="seed of the run")
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


def learning_rate_factor(step: int, total_steps: int) -> float:
    """Share of the full learning rate: warm-up, constant, then linear to zero."""
    warmup_steps = min(WARMUP_STEPS, 0.1 * total_steps)
    decay_steps = DECAY_SHARE * total_steps
    return min(1.0, (step + 1) / warmup_steps, (total_steps - step) / decay_steps)


def make_optimizers(
    model: torch.nn.Module, scale: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest.

    Args:
        model: its layers' names contain ".blocks." or ".layers.".
        scale: factor of both learning rates.
    """
    import torch

    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_layer = parameter.dim() == 2 and re.search(r"\.(blocks|layers)\.", name)
        (matrices if in_layer else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=scale * MUON_LEARNING_RATE,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=scale * ADAM_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]


def prepare(options: LoopOptions) -> None:
    """Set the threads and the seed; to be called before the model is made."""
    # Threads that spin while they wait lose all speed on a busy machine. This has an
    # effect only if nobody has loaded OpenMP before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def run_steps(
    output_dir: str | Path,
    options: LoopOptions,
    model: torch.nn.Module,
    step_loss: Callable[[Callable[..., Any], int], torch.Tensor],
    evaluate: Callable[[int], dict[str, float]],
    *,
    scale: float = 1.0,
    rate: Callable[[int, int], float] = learning_rate_factor,
    first_step: int = 0,
) -> bool:
    """Train a built-in model or a drafter to the last step; False if stopped before.

    Args:
        output_dir: Folder of the checkpoint `training.pt`.
        options: How to run; `prepare` has been called with them.
        model: The model; its parameters are changed.
        step_loss: Loss of a step, from the model's (compiled) forward and the step.
        evaluate: Shares by name after so many steps; "all" is shown all the time.
        scale: Factor of the learning rates.
        rate: Share of the full learning rate at a step of so many.
        first_step: Step to begin with where there is no checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or of another seed or network.
    """
    import torch

    compile_model = options.compile_model
    if compile_model is None:
        compile_model = bool(shutil.which("g++") or shutil.which("clang++"))
    forward = torch.compile(model, dynamic=True) if compile_model else model

    def updates(step: int) -> Iterator[dict[str, float]]:
        loss = step_loss(forward, step)
        loss.backward()
        yield {"loss": loss.item()}

    return run_updates(
        output_dir,
        options,
        model,
        updates,
        evaluate,
        optimizers=make_optimizers(model, scale),
        rate=rate,
        first_step=first_step,
    )


def run_updates(
    output_dir: str | Path,
    options: LoopOptions,
    model: torch.nn.Module,
    updates: Callable[[int], Iterator[Mapping[str, float]]],
    evaluate: Callable[[int], dict[str, float]] | None,
    *,
    optimizers: list[torch.optim.Optimizer],
    rate: Callable[[int, int], float],
    max_norm: float = 1.0,
    first_step: int = 0,
    record: Callable[[int, Mapping[str, float]], None] | None = None,
    processes: Processes | None = None,
) -> bool:
    """Train a network to the last step; False if stopped before.

    Args:
        output_dir: Folder of the checkpoint `training.pt`.
        options: How to run; `prepare` has been called with them.
        model: The network; its parameters that need gradients are changed.
        updates: The updates of a step, each of which has added to the gradients when
            its measures, "loss" among them, are yielded. Most recipes have one.
        evaluate: Shares by name after so many steps; "all" is shown all the time.
            None: the loss alone is shown.
        optimizers: Of the parameters; their learning rates are the full ones.
        rate: Share of the full learning rate at a step of so many.
        max_norm: Gradients are scaled down to this norm.
        first_step: Step to begin with where there is no checkpoint.
        record: Is told of each step's measures, the mean over its updates.
        processes: Those that train together; each process's gradients and measures
            are what its rows contribute. By default this one is alone.

    Raises:
        ValueError: the checkpoint is damaged, or of another seed or network.
    """
    from statistics import fmean

    import torch
    from tqdm import tqdm

    from vllm_dlm.training.distributed import alone, gather, is_first
    from vllm_dlm.training.progress import (
        CHECKPOINT,
        Progress,
        read_progress,
        trained_state,
        write_progress,
    )

    processes = processes or alone("cpu")
    checkpoint = Path(output_dir) / CHECKPOINT
    full_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    step, seconds, steps = first_step, 0.0, options.steps
    if options.resume and processes.of_first(checkpoint.exists()):
        state = read_progress(checkpoint)
        if state.seed != options.seed:
            raise ValueError(
                f"{checkpoint} has seed {state.seed}, not {options.seed}; use "
                "another folder, or --no-resume to start anew"
            )
        try:
            state.restore(checkpoint, model, optimizers)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} is of another network, or damaged ({error}); use "
                "another folder, or --no-resume to start anew"
            ) from error
        step, seconds = state.step, state.seconds

    def save() -> None:
        state = Progress(
            model=gather(trained_state(model)),
            optimizers=[gather(optimizer.state_dict()) for optimizer in optimizers],
            step=step,
            seconds=seconds + time.monotonic() - started,
            seed=options.seed,
        )
        if is_first():
            write_progress(checkpoint, state)

    started = last_save = processes.of_first(time.monotonic())
    progress = tqdm(
        total=steps,
        initial=step,
        unit="step",
        mininterval=10,
        disable=not is_first(),
    )
    mean_loss, accuracy = None, 0.0
    while step < steps:
        factor = rate(step, steps)
        measures: list[Mapping[str, float]] = []
        for measured in updates(step):
            measures.append(processes.totals(measured))
            processes.sum_gradients(model.parameters())
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for optimizer, full_rate in zip(optimizers, full_rates, strict=True):
                optimizer.param_groups[0]["lr"] = factor * full_rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        step += 1
        means = {name: fmean(each[name] for each in measures) for name in measures[0]}
        if record is not None:
            record(step, means)
        value = means["loss"]
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        progress.update()
        reward = means.get("reward")
        if step % 20 == 0 or reward is not None:
            shown = {"loss": f"{mean_loss:.4f}"}
            if reward is not None:
                shown["reward"] = f"{reward:.3f}"
            if evaluate is not None:
                shown["exact"] = f"{accuracy:.2f}"
            progress.set_postfix(shown, refresh=False)
        if evaluate and (step % options.eval_steps == 0 or step == steps):
            table = evaluate(step)
            accuracy = table.pop("all")
            cells = " ".join(f"{name} {share:.2f}" for name, share in table.items())
            progress.write(
                f"step {step} loss {mean_loss:.4f} exact {accuracy:.3f}: {cells}"
            )
        now = processes.of_first(time.monotonic())
        if now - last_save > 60 * options.checkpoint_minutes:
            save()
            last_save = now
        if options.max_minutes and now - started > 60 * options.max_minutes:
            break
    progress.close()
    save()
    return step == steps
