# SPDX-License-Identifier: Apache-2.0
"""Decoding loops whose forwards are fed mixtures of tokens, one request at a time.

DMax (arXiv 2604.08302, czg1225/DMax) and dInfer's iteration smoothing (2510.08666),
written from descriptions of their code as loops over input embeddings, for greedy
decoding. The mask id is never predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from reference.llada import TinyLLaDA
from reference.network import TinyModel, block_causal
from reference.procedures import row_statistics


@dataclass
class Softly:
    """One decoded request."""

    tokens: list[int]
    inputs: list[torch.Tensor] = field(repr=False)
    """Of each forward, [rows, hidden]: what the active block was fed."""
    gap: float
    """The least change of a probability that would have led to another decision."""

    @property
    def forwards(self) -> int:
        """How many there were."""
        return len(self.inputs)


def mixed_with_mask(
    sure: float, token: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """DMax's input of a written position, from two embeddings [hidden].

    Args:
        sure: the token's probability.
    """
    mixture = sure * token + (1 - sure) * mask
    length = sure * token.norm() + (1 - sure) * mask.norm()
    return mixture * (length / (mixture.norm() + 1e-6))


def generate_dmax(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    threshold: float,
    sure: float = 0.9,
    soft: bool = True,
    stops: bool = True,
) -> Softly:
    """Decode one request; blocks are counted from position 0, and see those before.

    Args:
        stops: the text ends with its first end-of-text token, when that block is over.
    """
    row = list(prompt_ids)
    start = len(row) // block_length * block_length
    inputs, gap, first = [], 1.0, len(prompt_ids)
    while len(row) < first + max_tokens:
        row += [model.mask_id] * (start + block_length - len(row))
        active = range(max(start, first), len(row))
        fed: dict[int, torch.Tensor] = {}
        for _ in range(block_length):
            embeds = model.embedding[row].clone()
            for p, mixture in fed.items():
                embeds[p] = mixture
            inputs.append(embeds[start:])
            visible = block_causal(len(row), block_length)
            logits = model.forward(row, visible=visible, embeds=embeds)[start:]
            found = row_statistics(logits, model.mask_id)
            best = dict(enumerate(found.argmax.tolist(), start))
            chance = dict(enumerate(found.confidence.tolist(), start))
            margin = dict(enumerate(found.margin.tolist(), start))

            masks = [p for p in active if row[p] == model.mask_id]
            run: list[int] = []
            for p in masks:
                gap = min(gap, abs(chance[p] - threshold))
                if chance[p] < threshold:
                    break
                run.append(p)
            written = run or masks[:1]
            decided = [p for p in active if p not in masks]
            changed = False
            for p in [*written, *decided]:
                gap = min(gap, margin[p])
                changed |= row[p] != best[p]
                row[p] = best[p]
            gap = min(gap, *(abs(chance[p] - sure) for p in active))
            if all(chance[p] >= sure for p in active) or not changed:
                break
            mask = model.embedding[model.mask_id]
            fed = {
                p: mixed_with_mask(chance[p], model.embedding[best[p]], mask)
                for p in [*written, *decided]
                if soft
            }
        output = row[first:]
        start += block_length
        if stops and model.eos_id in output:
            output = output[: output.index(model.eos_id) + 1]
            return Softly(output[:max_tokens], inputs, gap)
    return Softly(row[first:][:max_tokens], inputs, gap)


def generate_smooth(
    model: TinyLLaDA | TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    cache: str = "none",
    threshold: float = 0.8,
    threshold_decay: float = 0.02,
    weight_start: float = 0.15,
    weight_growth: float = 0.02,
    weight_max: float = 0.3,
    stops: bool = True,
) -> Softly:
    """Decode one request; blocks are counted from the prompt's end, all see all.

    Args:
        cache: "none", or "dual": a block's first forward computes everything, the
            others the block.
        stops: the text ends with its first end-of-text token, once all left of it is
            written.
    """
    first, length = len(prompt_ids), len(prompt_ids) + max_tokens
    length = first + -(-max_tokens // block_length) * block_length
    row = list(prompt_ids) + [model.mask_id] * (length - first)
    inputs, gap = [], 1.0

    def output() -> list[int] | None:
        """The text, once no mask is left in it."""
        text = row[first : first + max_tokens]
        if stops and model.eos_id in text:
            text = text[: text.index(model.eos_id) + 1]
        return None if model.mask_id in text else text

    for start in range(first, length, block_length):
        store = model.new_store(length)
        block = range(start, start + block_length)
        fed: dict[int, torch.Tensor] = {}
        step = 0
        while any(row[p] == model.mask_id for p in block):
            embeds = model.embedding[row].clone()
            for p, mixture in fed.items():
                embeds[p] = mixture
            inputs.append(embeds[list(block)])
            rows = list(block) if cache == "dual" and step else list(range(length))
            logits = model.forward(
                [row[p] for p in rows], rows, store, embeds=embeds[rows]
            )
            logits = logits[[rows.index(p) for p in block]]
            found = row_statistics(logits, model.mask_id)
            chance = dict(enumerate(found.confidence.tolist(), start))
            weight = min(weight_start + weight_growth * step, weight_max)
            bound = max(1 - threshold_decay * step, threshold)
            masks = [p for p in block if row[p] == model.mask_id]
            best = max(masks, key=lambda p: chance[p])
            bound = min(bound, chance[best] - 1e-5)
            for p in masks:
                if p != best:
                    gap = min(gap, abs(chance[p] - bound))
                if chance[p] >= bound:
                    row[p] = int(found.argmax[p - start])
                    gap = min(gap, float(found.margin[p - start]))
            # The mask id has its probability here.
            mean = logits.softmax(dim=1) @ model.embedding
            fed = {
                p: model.embedding[model.mask_id] + weight * mean[p - start]
                for p in block
                if row[p] == model.mask_id
            }
            step += 1
            if (text := output()) is not None:
                return Softly(text, inputs, gap)
    text = output()
    assert text is not None
    return Softly(text, inputs, gap)
