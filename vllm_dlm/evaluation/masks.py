# SPDX-License-Identifier: Apache-2.0
"""Which positions of a text are masked in each sample of its log-likelihood.

A masked diffusion model bounds the log-likelihood of a text x of L tokens by

    E over l uniform in 1..L, and over which l tokens are masked:
        (L / l) * sum over masked i of log p(x_i | the tokens that are left)

(LLaDA, arXiv 2502.09992). A model that writes block after block has such a sum for each
block, given the blocks to its left, and the text's is their sum. The numbers l of a
round's samples are spread evenly over 1..L, from a random one on: each of them is still
uniform, and together they vary less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw_masks(
    parts: Sequence[int], samples: int, strata: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of all samples of a text, and the weights of its tokens in them.

    Args:
        parts: lengths of the parts of the text that are masked independently.
        samples: a multiple of `strata`.
        strata: samples of a round.

    Returns:
        [samples, L] bool: masked; [samples, L] float64: L / l of the token's part.
    """
    drawn = [_draw_part(length, samples, strata, rng) for length in parts]
    masks, weights = zip(*drawn, strict=True)
    return np.concatenate(masks, axis=1), np.concatenate(weights, axis=1)


def _draw_part(
    length: int, samples: int, strata: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    first = rng.integers(0, length, size=samples // strata).repeat(strata)
    nth = np.tile(np.arange(strata), samples // strata)
    # Rounded down: any other rounding would prefer some numbers.
    counts = (first + nth * length // strata) % length + 1
    ranks = rng.permuted(np.tile(np.arange(length), (samples, 1)), axis=1)
    masks = ranks < counts[:, None]
    weights = np.broadcast_to((length / counts)[:, None], masks.shape)
    return masks, weights


def part_lengths(first: int, length: int, block_length: int, origin: int) -> list[int]:
    """Lengths of the parts into which blocks cut a text.

    Args:
        first: position of the text's first token.
        length: of the text, at least 1.
        block_length: of the model.
        origin: position from which blocks are counted.
    """
    start = first - (first - origin) % block_length
    ends = range(start + block_length, first + length + block_length, block_length)
    bounds = [first, *(min(end, first + length) for end in ends)]
    return [b - a for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
