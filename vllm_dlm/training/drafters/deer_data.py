# SPDX-License-Identifier: Apache-2.0
"""What a DEER drafter learns from: answers, cut, with masks behind the cut.

Stage I, continuation: an answer is cut at a random place, and tokens behind the cut are
masked. A row counts 1 / t, t being its share of masks, as in LLaDA (arXiv 2502.09992).
Stage II, refinement: only the last R tokens of an answer are masked, all of them; the
mask i = 1..R counts alpha**(R - i), so that those next to the text count most.
The paper (arXiv 2512.15176) marks the cut with a separator token. There is none here:
while drafting everything behind the text is masked and nothing before it, so the first
mask is the marker, and the served prefix is the text and nothing else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_dlm.training.drafters.teacher import Answered

ALPHA = 1.01
STAGE_ONE_SHARE = 0.7
"""Share of the steps that belong to stage I."""
NUM_PROGRESS_PROMPTS = 120
BATCH_ROWS = 64
MAX_REFINED = 96
"""R is drawn from 1 to this, or to the answer's length."""
# Of the rows, those with fewer masks than a block: the room that is left near a
# request's last token.
SHORT_SHARE = 0.25
# Of stage I's rows, those with all masks, which is what a drafter meets. The others
# have a share of masks from MIN_RATIO to 1; below it 1 / t would be all there is.
FULL_SHARE = 0.5
MIN_RATIO = 0.1
# The end token right behind the answer counts like an answer's, the rest hardly.
PADDING_WEIGHT = 0.05


@dataclass(frozen=True)
class Recipe:
    """What a drafter is trained to do.

    Args:
        mask_id: The drafter's mask token.
        end_id: The token behind an answer's end.
        block_length: Masks behind a text, as served.
        alpha: Base of stage II's weights.
        stage_one_steps: Steps of stage I; all later ones are of stage II.

    Raises:
        ValueError: a value out of its range.
    """

    mask_id: int
    end_id: int
    stage_one_steps: int
    block_length: int = 32
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise ValueError(f"block_length must be above 0, not {self.block_length}")
        if self.alpha < 1:
            raise ValueError(f"alpha must be at least 1, not {self.alpha}")


def kept_prompts(count: int) -> int:
    """How many of the first prompts are kept out of the training, to measure on."""
    return min(NUM_PROGRESS_PROMPTS, max(1, count // 10))


@dataclass(frozen=True)
class Row:
    """A text, what follows it, and what of that is masked with which weight."""

    text: list[int]
    rest: list[int]
    weights: list[float]
    """The loss's weight of each token of `rest`; 0 where it is not masked."""


def stage_one_row(
    rng: random.Random, prompt: list[int], answer: list[int], recipe: Recipe
) -> Row:
    """Cut an answer at a random place and mask some of what follows."""
    cut = rng.randrange(len(answer))
    width = _width(rng, recipe)
    rest, padding = _fill(answer[cut:], width, recipe.end_id)
    ratio = 1.0
    if rng.random() >= FULL_SHARE:
        ratio = rng.uniform(MIN_RATIO, 1.0)
    weights = [
        (PADDING_WEIGHT if place >= padding else 1.0) / ratio
        if rng.random() < ratio
        else 0.0
        for place in range(len(rest))
    ]
    return Row(prompt + answer[:cut], rest, weights)


def stage_two_row(
    rng: random.Random, prompt: list[int], answer: list[int], recipe: Recipe
) -> Row:
    """Mask the last R tokens of an answer, R drawn at random, and what follows."""
    from vllm_dlm.spec_decode.deer.drafting import suffix_weights

    refined = rng.randint(1, min(MAX_REFINED, len(answer)))
    cut = len(answer) - refined
    width = max(refined, _width(rng, recipe))
    rest, padding = _fill(answer[cut:], width, recipe.end_id)
    weights = suffix_weights(refined, recipe.alpha).tolist()
    weights += [PADDING_WEIGHT] * (len(rest) - padding)
    return Row(prompt + answer[:cut], rest, weights)


def _width(rng: random.Random, recipe: Recipe) -> int:
    if rng.random() < SHORT_SHARE:
        return rng.randint(1, recipe.block_length)
    return recipe.block_length


def _fill(rest: list[int], width: int, end_id: int) -> tuple[list[int], int]:
    """`width` tokens, and where the padding in them begins.

    An answer that was cut before its end is not padded: nothing is known of it there.
    """
    if rest[-1] == end_id:
        rest, padding = rest + [end_id] * (width - len(rest)), len(rest)
        return rest[:width], min(width, padding)
    return rest[:width], min(width, len(rest))


def make_batch(
    answered: Answered, step: int, seed: int, recipe: Recipe, rows: int = BATCH_ROWS
) -> tuple[torch.Tensor, ...]:
    """Token ids, masked token ids, valid and loss weights of a step.

    All [rows, length]; the rows are left-aligned, `valid` where they have tokens.
    """
    import torch

    rng = random.Random(f"deer-{seed}-{step}")
    make_row = stage_one_row if step < recipe.stage_one_steps else stage_two_row
    drawn = []
    for _ in range(rows):
        index = rng.randrange(len(answered.answers))
        drawn.append(
            make_row(rng, answered.prompts[index], answered.answers[index], recipe)
        )
    length = max(len(row.text) + len(row.rest) for row in drawn)
    ids = torch.full((rows, length), recipe.end_id)
    weights = torch.zeros(rows, length)
    valid = torch.zeros(rows, length, dtype=torch.bool)
    for index, row in enumerate(drawn):
        end = len(row.text) + len(row.rest)
        ids[index, :end] = torch.tensor(row.text + row.rest)
        weights[index, len(row.text) : end] = torch.tensor(row.weights)
        valid[index, :end] = True
    return ids, ids.masked_fill(weights > 0, recipe.mask_id), valid, weights
