# SPDX-License-Identifier: Apache-2.0
"""How an acceptance head is trained and measured (SpecDec++, arXiv 2405.19715).

Soft-label cross-entropy in which the reject class weighs more; the draft model is
frozen. `specdec_head` is the command, `specdec_data` makes the sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_dlm.training.drafters.specdec_data import (
    BATCH_ROWS,
    Sequence,
    hidden_states,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

EPOCHS = 3
WARMUP_SHARE = 0.03
REJECT_WEIGHT = 6.0

LossMean = Literal["weights", "tokens"]
"""What a batch's weighted sum is divided by: the sum of its weights, as published, or
the number of its tokens, so that a batch with more rejections counts for more."""

LOSS_MEAN: LossMean = "weights"

Blocks = Literal["separate", "shared"]
"""Whether the head's three blocks have weights of their own, or are one block that is
applied three times, as published."""


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


def default_learning_rate(hidden_size: int) -> float:
    """Highest learning rate for a head that reads hidden states of this width H.

    5e-5 x 4096 / H, and never more than 4e-3. The published script trains the head of
    a 7B drafter (4,096 wide), the only size that it names, at its trainer's default,
    5e-5. Steps in proportion to 1 / H are the usual rule for AdamW; for
    llama-tiny-draft (96 wide) that is 2.1e-3, and 4e-3 is the highest that was tried.
    """
    return min(4e-3, 5e-5 * 4096 / hidden_size)


def head_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    reject_weight: float,
    mean: LossMean,
) -> torch.Tensor:
    """Mean cross-entropy with soft labels, the reject class weighted.

    Args:
        logits: [N, 2]: reject, accept.
        labels: [N] probability that the token is accepted.
        reject_weight: Weight w of the reject class; the accept class has 1.
        mean: Over N tokens, or over their weights, the sum of w (1 - label) + label.
    """
    scores = logits.float().log_softmax(-1)
    rejected, accepted = reject_weight * (1 - labels), labels
    total = -(rejected * scores[:, 0] + accepted * scores[:, 1]).sum()
    if mean == "weights":
        return total / (rejected + accepted).sum()
    return total / len(labels)


def train_head(
    draft: PreTrainedModel,
    sequences: list[Sequence],
    *,
    epochs: int = EPOCHS,
    learning_rate: float | None = None,
    reject_weight: float = REJECT_WEIGHT,
    loss_mean: LossMean = LOSS_MEAN,
    blocks: Blocks = "separate",
    seed: int = 1,
    batch_rows: int = BATCH_ROWS,
) -> AcceptanceHead:
    """A head trained on sequences; cosine schedule, the draft model frozen.

    A learning rate of None is `default_learning_rate` of the draft model's width.
    """
    import torch
    from tqdm import tqdm

    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

    torch.manual_seed(seed)
    hidden_size = draft.config.hidden_size
    if learning_rate is None:
        learning_rate = default_learning_rate(hidden_size)
    head = AcceptanceHead(hidden_size, shared=blocks == "shared").to(draft.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
    num_steps = epochs * math.ceil(len(sequences) / batch_rows)
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    progress = tqdm(total=num_steps, desc="head", unit="step", mininterval=5)
    for step, batch in enumerate(_batches(sequences, epochs, batch_rows, seed)):
        hidden, labels = hidden_states(draft, batch)
        progress.update()
        if not len(labels):
            continue
        loss = head_loss(head(hidden), labels, reject_weight, loss_mean)
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
    """A head's verdicts on sequences, compared with the labels.

    Losses are means over tokens, whatever the head was trained with.
    """
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
        loss=head_loss(logit, label, reject_weight, "tokens").item(),
        constant_loss=head_loss(flat, label, reject_weight, "tokens").item(),
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
