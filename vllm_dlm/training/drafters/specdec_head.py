# SPDX-License-Identifier: Apache-2.0
"""Train the acceptance head of a draft model: `vllm-dlm train specdec-head`.

SpecDec++ (arXiv 2405.19715). The head learns how probably the target accepts a token
that the draft model has drawn, from the draft model's last hidden state at that token
(`specdec_data`). Soft-label cross-entropy in which the reject class weighs more; the
draft model is frozen. A head fits one pair of models and the temperature of its data.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dlm.cli.arguments import output_folder
from vllm_dlm.files.whole_files import write_text
from vllm_dlm.training.drafters.specdec_data import (
    BATCH_ROWS,
    MIXING_RATIO,
    Sequence,
    hidden_states,
    make_sequences,
)
from vllm_dlm.training.loop import LoopOptions, prepare

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

NUM_PROMPTS = 6000
EPOCHS = 3
LEARNING_RATE = 1e-3
WARMUP_SHARE = 0.03
REJECT_WEIGHT = 6.0
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
{learning_rate}, soft-label cross-entropy with the reject class weighted \
{reject_weight}; {minutes} minutes on {hardware}, the target's answers included.
- On {kept} sequences kept out of the training: loss {loss} (the best constant \
verdict: {constant_loss}). On average the head gives {mean_verdict:.3f}, and \
{mean_label:.3f} is accepted: the weight of the reject class makes it careful. Of two \
tokens, one of which rather passes, it trusts that one more in {ranking:.1f} % of all \
pairs.
"""


@dataclass(frozen=True)
class Quality:
    """A head's verdicts on sequences that it was not trained on."""

    loss: float
    constant_loss: float
    """The loss of the best head that says the same of every token."""
    mean_label: float
    mean_verdict: float
    """Above the labels' mean or below: `reject_weight` pulls it down."""
    ranking: float
    """Share of pairs of a token that rather passes and one that rather does not in
    which the head trusts the former more; 1/2 is chance, nan if there are no pairs."""


def head_loss(
    logits: torch.Tensor, labels: torch.Tensor, reject_weight: float
) -> torch.Tensor:
    """Mean cross-entropy with soft labels, the reject class weighted.

    Args:
        logits: [N, 2]: reject, accept.
        labels: [N] probability that the token is accepted.
        reject_weight: Weight of the reject class; the accept class has 1.
    """
    scores = logits.float().log_softmax(-1)
    losses = reject_weight * (1 - labels) * scores[:, 0] + labels * scores[:, 1]
    return -losses.mean()


def train_head(
    draft: PreTrainedModel,
    sequences: list[Sequence],
    *,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    reject_weight: float = REJECT_WEIGHT,
    seed: int = 1,
    batch_rows: int = BATCH_ROWS,
) -> AcceptanceHead:
    """A head trained on sequences; cosine schedule, the draft model frozen."""
    import torch
    from tqdm import tqdm

    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

    torch.manual_seed(seed)
    head = AcceptanceHead(draft.config.hidden_size).to(draft.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    num_steps = epochs * math.ceil(len(sequences) / batch_rows)
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    progress = tqdm(total=num_steps, desc="head", unit="step", mininterval=5)
    for step, batch in enumerate(_batches(sequences, epochs, batch_rows, seed)):
        hidden, labels = hidden_states(draft, batch)
        progress.update()
        if not len(labels):
            continue
        loss = head_loss(head(hidden), labels, reject_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        factor = min((step + 1) / warmup, 1.0) * 0.5
        factor *= 1 + math.cos(math.pi * step / num_steps)
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    progress.close()
    return head


def _batches(
    sequences: list[Sequence], epochs: int, rows: int, seed: int
) -> Iterator[list[Sequence]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for first in range(0, len(order), rows):
            yield [sequences[index] for index in order[first : first + rows]]


def measure_head(
    head: AcceptanceHead,
    draft: PreTrainedModel,
    sequences: list[Sequence],
    reject_weight: float = REJECT_WEIGHT,
    batch_rows: int = BATCH_ROWS,
) -> Quality:
    """A head's verdicts on sequences, compared with the labels."""
    import torch

    logits, labels = [], []
    for first in range(0, len(sequences), batch_rows):
        hidden, label = hidden_states(draft, sequences[first : first + batch_rows])
        with torch.inference_mode():
            logits.append(head(hidden))
        labels.append(label)
    logit, label = torch.cat(logits), torch.cat(labels)
    verdict = logit.softmax(-1)[:, 1]
    mean = label.mean()
    # The minimum over a of w (1 - y) log(1 - a) + y log a.
    constant = mean / (mean + reject_weight * (1 - mean))
    flat = torch.stack([1 - constant, constant]).log().expand_as(logit)
    return Quality(
        loss=head_loss(logit, label, reject_weight).item(),
        constant_loss=head_loss(flat, label, reject_weight).item(),
        mean_label=mean.item(),
        mean_verdict=verdict.mean().item(),
        ranking=_ranking(verdict, label > 0.5),
    )


def _ranking(verdict: torch.Tensor, passes: torch.Tensor) -> float:
    good, bad = verdict[passes], verdict[~passes].sort().values
    if not len(good) or not len(bad):
        return math.nan
    import torch

    # Bad tokens below each good one; those level with it count half.
    below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)
    return (below.double().mean() / (2 * len(bad))).item()


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
    learning_rate: float = LEARNING_RATE,
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
        learning_rate: Highest learning rate.
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
        if value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")
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
    head = train_head(
        draft_model,
        sequences[kept:],
        epochs=epochs,
        learning_rate=learning_rate,
        reject_weight=reject_weight,
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
        "learning_rate": str(learning_rate),
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
        ("learning-rate", float, LEARNING_RATE, "highest learning rate"),
        ("seed", int, 1, "seed of the run"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{text} ({default})"
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
