# SPDX-License-Identifier: Apache-2.0
"""Train the acceptance head of a draft model: `vllm-dlm train specdec-head`.

SpecDec++ (arXiv 2405.19715). The head learns how probably the target accepts a token
that the draft model has drawn, from the draft model's last hidden state at that token
(`specdec_data`). Soft-label cross-entropy in which the reject class weighs more; the
draft model is frozen. A head fits one pair of models and the temperature of its data.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

from vllm_dlm.cli.arguments import output_folder
from vllm_dlm.files.whole_files import write_text
from vllm_dlm.training.drafters.specdec_data import MIXING_RATIO, make_sequences
from vllm_dlm.training.drafters.specdec_fit import (
    EPOCHS,
    LOSS_MEAN,
    REJECT_WEIGHT,
    Blocks,
    LossMean,
    Quality,
    default_learning_rate,
    measure_head,
    train_head,
)
from vllm_dlm.training.loop import LoopOptions, prepare

NUM_PROMPTS = 6000
# Of the sequences, those kept for the numbers at the end.
KEPT_SHARE = 0.05

_CARD = """\
# Acceptance head of {draft} for {target}

SpecDec++ (arXiv 2405.19715): from the last hidden state of the draft model at a token \
that it has drawn, how probably the target accepts that token.

- Data: {num_prompts} prompts ({prompts}), the target's answers at temperature \
{temperature} and one token of the draft model at each of their positions; \
{mixing_ratio} of the inputs are the target's own tokens, which are not judged.
- Training: `vllm-dlm train specdec-head`, seed {seed}, {epochs} epochs, AdamW at \
{learning_rate}, {blocks} blocks, soft-label cross-entropy with the reject class \
weighted {reject_weight}, a batch's mean over its {loss_mean}; {minutes} minutes on \
{hardware}, the target's answers included.
- On {kept} sequences kept out of the training: loss {loss} per token (the best \
constant verdict: {constant_loss}). On average the head gives {mean_verdict:.3f}, and \
{mean_label:.3f} is accepted: the weight of the reject class makes it careful. Of two \
tokens, one of which rather passes, it trusts that one more in {ranking:.1f} % of all \
pairs.
"""


def train(
    *,
    target: str,
    draft: str,
    output: str | Path,
    prompts: str | Path | None = None,
    num_prompts: int = NUM_PROMPTS,
    max_tokens: int = 64,
    temperature: float = 1.0,
    mixing_ratio: float = MIXING_RATIO,
    reject_weight: float = REJECT_WEIGHT,
    epochs: int = EPOCHS,
    learning_rate: float | None = None,
    loss_mean: LossMean = LOSS_MEAN,
    blocks: Blocks = "separate",
    seed: int = 1,
    device: str = "cpu",
    threads: int | None = None,
) -> Quality:
    """Collect data, train a head, and save it and its card to `output`.

    Args:
        target: Folder, hub id or alias of the target.
        draft: The same of the draft model.
        output: Folder of the head: the draft model's, or any other.
        prompts: File of prompts; None asks the built-in tasks.
        num_prompts: Most prompts.
        max_tokens: Most tokens of an answer.
        temperature: Of the target's answers and of both distributions.
        mixing_ratio: Share of the target's tokens in the inputs.
        reject_weight: Weight of the reject class.
        epochs: Passes over the data.
        learning_rate: Highest learning rate; by default that of the draft model's
            width (`default_learning_rate`).
        loss_mean: What a batch's weighted loss is divided by (`LossMean`).
        blocks: Of the head (`Blocks`).
        seed: Seed of the prompts, the draws and the head.
        device: Of both models, as PyTorch names it.
        threads: CPU threads; PyTorch's choice by default.

    Raises:
        ValueError: models or prompts that do not fit, or a value out of its range.
    """
    if not 0 <= mixing_ratio < 1:
        raise ValueError(f"mixing_ratio must be from 0 to below 1, not {mixing_ratio}")
    for name, value in (
        ("reject_weight", reject_weight),
        ("epochs", epochs),
        ("learning_rate", learning_rate),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, not {value}")
    for name, choice, choices in (
        ("loss_mean", loss_mean, get_args(LossMean)),
        ("blocks", blocks, get_args(Blocks)),
    ):
        if choice not in choices:
            raise ValueError(f"{name} must be {' or '.join(choices)}, not {choice!r}")
    if num_prompts < 2:
        raise ValueError(f"num_prompts must be at least 2, not {num_prompts}")
    prepare(LoopOptions(steps=1, seed=seed, threads=threads))
    from vllm_dlm.training.cards import hardware
    from vllm_dlm.training.drafters.teacher import (
        check_same_vocabulary,
        load_causal_lm,
        recorded_answers,
    )

    check_same_vocabulary(target, draft)
    target_model = load_causal_lm(target, device)
    draft_model = load_causal_lm(draft, device)
    started = time.monotonic()
    answered = recorded_answers(
        None,
        target_model,
        target,
        prompts=prompts,
        num_prompts=num_prompts,
        max_tokens=max_tokens,
        seed=seed,
        temperature=temperature,
    )
    sequences = make_sequences(
        target_model,
        draft_model,
        answered,
        temperature=temperature,
        mixing_ratio=mixing_ratio,
        seed=seed,
    )
    kept = max(1, round(KEPT_SHARE * len(sequences)))
    if learning_rate is None:
        learning_rate = default_learning_rate(draft_model.config.hidden_size)
    head = train_head(
        draft_model,
        sequences[kept:],
        epochs=epochs,
        learning_rate=learning_rate,
        reject_weight=reject_weight,
        loss_mean=loss_mean,
        blocks=blocks,
        seed=seed,
    )
    quality = measure_head(head, draft_model, sequences[:kept], reject_weight)
    about = {
        "format": "pt",
        "target": target,
        "draft": draft,
        "prompts": "built-in tasks" if prompts is None else Path(prompts).name,
        "num_prompts": str(len(sequences)),
        "temperature": str(temperature),
        "mixing_ratio": str(mixing_ratio),
        "reject_weight": str(reject_weight),
        "epochs": str(epochs),
        "learning_rate": f"{learning_rate:.3g}",
        "loss_mean": loss_mean,
        "blocks": blocks,
        "seed": str(seed),
        "minutes": f"{(time.monotonic() - started) / 60:.1f}",
        "loss": f"{quality.loss:.4f}",
        "constant_loss": f"{quality.constant_loss:.4f}",
    }
    file = head.save(output, about)
    card = _CARD.format(
        **about,
        hardware=hardware(),
        kept=kept,
        mean_verdict=quality.mean_verdict,
        mean_label=quality.mean_label,
        ranking=100 * quality.ranking,
    )
    write_text(file.parent / "README.md", card)
    print(f"Saved {file}")
    return quality


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vllm-dlm train specdec-head`."""
    from vllm_dlm.spec_decode.specdec_pp.head import HEAD_FILE

    parser.add_argument(
        "--target",
        default="llama-tiny",
        help="the model that verifies: folder, hub id or alias",
    )
    parser.add_argument(
        "--draft",
        default="llama-tiny-draft",
        help="the draft model, with the target's tokenizer: folder, hub id or alias",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        help=f"folder below which {HEAD_FILE} is written; by default the draft "
        "model's, where serving looks for it",
    )
    parser.add_argument(
        "--prompts",
        help="text file, one prompt per line, or .jsonl with the key "
        '"prompt"; by default the tasks of the built-in models',
    )
    for name, kind, default, text in (
        ("num-prompts", int, NUM_PROMPTS, "most prompts answered"),
        ("max-tokens", int, 64, "most tokens of an answer"),
        (
            "temperature",
            float,
            1.0,
            "of the target's answers, of the drafts and of the labels; 0 is greedy",
        ),
        (
            "mixing-ratio",
            float,
            MIXING_RATIO,
            "share of the target's tokens in the head's inputs",
        ),
        ("reject-weight", float, REJECT_WEIGHT, "weight of the reject class"),
        ("epochs", int, EPOCHS, "passes over the data"),
        ("seed", int, 1, "seed of the run"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{text} ({default})"
        )
    parser.add_argument(
        "--learning-rate",
        type=float,
        help="highest learning rate; by default by the draft model's width H, "
        "5e-5 x 4096 / H, at most 4e-3: as published at 4096",
    )
    parser.add_argument(
        "--loss-mean",
        choices=get_args(LossMean),
        default=LOSS_MEAN,
        help="what a batch's weighted loss is divided by: its weights, as published, "
        f"or its tokens ({LOSS_MEAN})",
    )
    parser.add_argument(
        "--blocks",
        choices=get_args(Blocks),
        default="separate",
        help="of the head: three, or one applied three times, as published (separate)",
    )
    parser.add_argument(
        "--device", default="cpu", help="of both models, as PyTorch names it (cpu)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")


def run(args: argparse.Namespace) -> None:
    """Train the head and print its quality on held-out sequences."""
    from vllm_dlm.config.aliases import resolve

    output = args.output
    if output is None:
        output = resolve(args.draft)
        if not Path(output).is_dir():
            raise ValueError(
                f"{args.draft} is no folder on this machine; name one with --output"
            )
    quality = train(
        target=args.target,
        draft=args.draft,
        output=output,
        prompts=args.prompts,
        num_prompts=args.num_prompts,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        mixing_ratio=args.mixing_ratio,
        reject_weight=args.reject_weight,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        loss_mean=args.loss_mean,
        blocks=args.blocks,
        seed=args.seed,
        device=args.device,
        threads=args.threads,
    )
    print(
        "On sequences kept out of the training: "
        f"loss {quality.loss:.3f} (constant verdict: {quality.constant_loss:.3f}), "
        f"pairs ranked right {100 * quality.ranking:.1f} %, "
        f"mean verdict {quality.mean_verdict:.3f}, mean label {quality.mean_label:.3f}"
    )
