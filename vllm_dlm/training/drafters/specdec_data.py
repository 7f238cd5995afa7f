# SPDX-License-Identifier: Apache-2.0
"""What an acceptance head learns from: drafted tokens, and how probably they pass.

SpecDec++ (arXiv 2405.19715). The target answers prompts. At each position of an answer
the draft model draws one token y from its distribution q after the target's own prefix,
and min(1, p(y) / q(y)) is how probably the target accepts it. The inputs mix these
tokens with some of the target's; only the draft's are judged, each by the hidden state
AT the token: the state at input token i judges token i, not the one drawn from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vllm_dlm.training.drafters.teacher import Answered

BATCH_ROWS = 32
MIXING_RATIO = 0.15


@dataclass(frozen=True)
class Sequence:
    """A prompt with a mixed answer, and what is known of its tokens."""

    tokens: list[int]
    """Prompt and mixed answer."""
    labels: list[float]
    """How probably the target accepts each token; -1 where it is not judged."""


def distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """What tokens are drawn from, [..., V]; a one-hot of the best at temperature 0."""
    import torch.nn.functional as F

    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits.float() / temperature).softmax(-1)


def label_tokens(
    target: torch.Tensor, draft: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one draft token per position, and its soft label min(1, p / q).

    Args:
        target: [N, V] the target's distributions p.
        draft: [N, V] the draft model's distributions q.
        generator: Source of randomness.

    Returns:
        Token ids [N] and labels [N] in 0..1.
    """
    import torch

    tokens = torch.multinomial(draft, 1, generator=generator)
    ratio = target.gather(1, tokens) / draft.gather(1, tokens)
    return tokens[:, 0], ratio[:, 0].clamp(max=1.0)


def make_sequences(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    answered: Answered,
    *,
    temperature: float,
    mixing_ratio: float,
    seed: int,
    batch_rows: int = BATCH_ROWS,
) -> list[Sequence]:
    """Let the draft model draw, label what it drew, and mix it with the answers.

    Args:
        target: The target.
        draft: The draft model.
        answered: Prompts and the target's answers.
        temperature: Of both models.
        mixing_ratio: Share of positions that keep the target's token, unjudged.
        seed: Seed of the draws.
        batch_rows: Sequences per forward.
    """
    import torch
    from tqdm import tqdm

    from vllm_dlm.training.drafters.teacher import pad_right

    # Embeddings may be padded, each model's to a width of its own.
    vocabulary = min(target.config.vocab_size, draft.config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    rows = range(0, len(answered.prompts), batch_rows)
    sequences = []
    for first in tqdm(rows, desc="draft's tokens", unit="batch"):
        prompts = answered.prompts[first : first + batch_rows]
        answers = answered.answers[first : first + batch_rows]
        ids, valid = pad_right([p + a for p, a in zip(prompts, answers, strict=True)])
        starts = torch.tensor([len(prompt) for prompt in prompts])
        column = torch.arange(1, ids.shape[1])
        predicts = (column >= starts[:, None]) & valid[:, 1:]
        p, q = (
            distribution(
                _logits(model, ids, valid)[:, :-1][predicts][:, :vocabulary],
                temperature,
            )
            for model in (target, draft)
        )
        drawn, accepted = label_tokens(p, q, generator)
        keeps = torch.rand(len(drawn), generator=generator) < mixing_ratio
        own = ids[:, 1:][predicts]
        tokens = torch.where(keeps, own, drawn).split([len(a) for a in answers])
        labels = torch.where(keeps, -1.0, accepted).split([len(a) for a in answers])
        sequences += [
            Sequence(prompt + mixed.tolist(), [-1.0] * len(prompt) + label.tolist())
            for prompt, mixed, label in zip(prompts, tokens, labels, strict=True)
        ]
    return sequences


def _logits(
    model: PreTrainedModel, ids: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    import torch

    device = model.device
    with torch.inference_mode():
        output = model(input_ids=ids.to(device), attention_mask=valid.long().to(device))
    return output.logits.cpu()


def hidden_states(
    draft: PreTrainedModel, sequences: list[Sequence]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states [N, H] at all judged tokens, and their labels [N].

    Both in float32, on the draft model's device.
    """
    import torch

    from vllm_dlm.training.drafters.teacher import pad_right

    ids, valid = pad_right([sequence.tokens for sequence in sequences])
    labels = torch.full(ids.shape, -1.0)
    for row, sequence in enumerate(sequences):
        labels[row, : len(sequence.labels)] = torch.tensor(sequence.labels)
    device = draft.device
    with torch.no_grad():
        output = draft.base_model(
            input_ids=ids.to(device), attention_mask=valid.long().to(device)
        )
    judged = labels >= 0
    states = output.last_hidden_state[judged.to(device)]
    return states.float(), labels[judged].to(device)
