# SPDX-License-Identifier: Apache-2.0
"""DEER: a diffusion language model drafts a block for an autoregressive target.

One denoising step over `[text][k masks]` gives k distributions, each of which knows the
text only; a token is drawn from each. Verification is vLLM's: accept with min(1, p/q),
at the first rejection draw from the rest, and drop what follows. A reconstruction from
the paper (arXiv 2512.15176), whose code is not public.

The paper computes the whole text in every round. Where a drafter's text does not see
the masks behind it, its keys and values are final, and only what is new is computed:
`why_not_cached` says where. Nothing of vLLM is used here: `proposer.py` faces that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.model_executor.planning.segments import Segments, cut_segments, ragged

Context: TypeAlias = Literal["recompute", "cached"]


def suffix_weights(length: int, alpha: float = 1.01) -> np.ndarray:
    """Weights of a masked suffix in training stage II: most where the text ends.

    The first of R masks weighs alpha**(R - 1), the last 1. The paper's alpha is 1.01,
    1.02 is noisy and 1.05 diverges.

    Returns:
        [length] float64.

    Raises:
        ValueError: no masks, or weights that do not fall.
    """
    if length < 1:
        raise ValueError(f"a suffix has at least 1 mask, not {length}")
    if alpha < 1:
        raise ValueError(f"alpha is at least 1, not {alpha}: near masks weigh most")
    weights: np.ndarray = alpha ** np.arange(length - 1, -1, -1, dtype=np.float64)
    return weights


def check_drafter(hf_config: Any, num_masks: int) -> ModelDefaults:
    """What a drafter declares.

    Args:
        hf_config: the drafter's.
        num_masks: k, the most masks behind a text.

    Raises:
        ValueError: it is no diffusion model of ours, or was not made for k masks.
    """
    if not hasattr(hf_config, "dlm_class"):
        raise ValueError(
            "speculative method 'deer' drafts with a diffusion language model, and the "
            f"drafter is a {hf_config.model_type!r}: choose one of those that "
            "`vllm-dlm models` lists, with the target's tokenizer"
        )
    defaults = ModelDefaults.from_hf_config(hf_config)
    if defaults.attention == "causal" and num_masks > defaults.block_length:
        raise ValueError(
            f"this drafter decodes blocks of {defaults.block_length}, and "
            f"num_speculative_tokens asks for {num_masks} masks: set it to at most "
            f"{defaults.block_length}"
        )
    return defaults


def draft_length(defaults: ModelDefaults, most: int) -> int:
    """Masks that a drafter was trained to fill in one step, at most `most`.

    What its training has written down, else its blocks; a model that attends in both
    directions and says nothing gets the usual block.
    """
    return min(defaults.draft_length or defaults.block_length, most)


def untrained_masks(defaults: ModelDefaults, num_masks: int) -> str:
    """Why k masks are more than the drafter was trained for; "" where they are not."""
    trained = defaults.draft_length
    if trained is None and defaults.attention == "full":
        # The whole canvas is one block to it.
        trained = defaults.max_canvas
    elif trained is None:
        trained = defaults.block_length
    if num_masks <= trained:
        return ""
    return (
        f"the drafter was trained for {trained} masks behind a text, and "
        f"num_speculative_tokens asks for {num_masks}: texts stay right, and the masks "
        f"behind the first {trained} may be guessed badly"
    )


def why_not_cached(defaults: ModelDefaults, page_size: int, shares_pages: bool) -> str:
    """Why a text's keys cannot be kept between rounds; "" where they can.

    Args:
        page_size: tokens in a KV page.
        shares_pages: whether prefix caching is on.
    """
    block = defaults.block_length
    if defaults.attention == "full":
        return (
            "the drafter attends in both directions, so that all keys change with "
            "every token and mask"
        )
    if defaults.attention == "causal":
        return ""
    if defaults.block_origin == "prompt":
        return "the drafter's blocks are counted from the end of the text, which moves"
    if shares_pages and page_size % block:
        return (
            f"the drafter's blocks of {block} tokens do not fill pages of {page_size}, "
            "and prefix caching would share keys that depend on other tokens (set "
            f"--block-size {np.lcm(page_size, block)} or --no-enable-prefix-caching)"
        )
    return ""


def context_of(asked: Literal["auto", "recompute", "cached"], reason: str) -> Context:
    """How the drafter gets its keys and values of a text.

    Args:
        asked: the option; "auto" is "cached" wherever that gives the same drafts.
        reason: of `why_not_cached`.

    Raises:
        ValueError: "cached" would give other drafts; the message says why.
    """
    if asked == "cached" and reason:
        raise ValueError(
            f"speculative method 'deer', context 'cached': {reason}. Use 'recompute', "
            "or leave it at 'auto'"
        )
    return "recompute" if reason or asked == "recompute" else "cached"


def first_rows(defaults: ModelDefaults, starts: np.ndarray) -> np.ndarray:
    """[R] where rows begin if keys left of `starts` [R] were computed before.

    Of a block that was not complete then, they did not see the block's end.
    """
    if defaults.attention == "block":
        return starts - starts % defaults.block_length
    return starts


@dataclass(frozen=True)
class Plan:
    """One forward of the drafter: R requests, N rows, M of which predict drafts.

    All arrays are on the host.
    """

    requests: np.ndarray
    """[R] the requests' rows in the target's batch."""
    owners: np.ndarray
    """[N] request of each row, 0 to R - 1."""
    positions: np.ndarray
    """[N] int64: in the request."""
    is_mask: np.ndarray
    """[N] bool: behind the text."""
    logits_rows: np.ndarray
    """[M] int64: which rows predict the masks, request by request."""
    segments: Segments
    causal: np.ndarray | None
    """[S] bool: segments in which a row sees none to its right; None for none."""


def plan_forward(
    defaults: ModelDefaults,
    requests: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    widths: np.ndarray,
) -> Plan:
    """Lay out one forward.

    Args:
        requests: [R] rows of the target's batch.
        starts: [R] first position that is computed, left of `ends`.
        ends: [R] where the text ends, and the masks begin.
        widths: [R] masks; 0 computes keys and values only.
    """
    last = ends + widths
    # A text is to the drafter what a prompt is: blocks may be counted from its end.
    origins = np.array([defaults.origin(end, defaults.block_length) for end in ends])
    lengths = np.full_like(ends, defaults.block_length)
    if defaults.attention == "causal":
        # The text causally, then one block, of all masks.
        origins, lengths = ends, np.maximum(widths, 1)
    segments = cut_segments(
        defaults.attention, starts, last, lengths, origins, first_blocks=ends
    )
    causal = None
    if defaults.attention == "causal":
        causal = ~(segments.is_last & (widths > 0)[segments.request])
    owners, offsets = ragged(last - starts)
    first = np.cumsum(last - starts) - (last - starts)
    masks, places = ragged(widths)
    return Plan(
        requests=requests,
        owners=owners,
        positions=starts[owners] + offsets,
        is_mask=starts[owners] + offsets >= ends[owners],
        logits_rows=(first + ends - starts)[masks] + places - defaults.shift,
        segments=segments,
        causal=causal,
    )


def split(lengths: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Whole requests per forward, in order, so that rows stay below `most`.

    Args:
        lengths: [R] rows of each request; one that is longer goes alone.

    Yields:
        Indices of the requests of a forward.
    """
    first, rows = 0, 0
    for request, length in enumerate(lengths):
        if rows and rows + length > most:
            yield np.arange(first, request)
            first, rows = request, 0
        rows += length
    if first < len(lengths):
        yield np.arange(first, len(lengths))


def greedy_drafts(logits: torch.Tensor, mask_id: int) -> torch.Tensor:
    """[n] int64: the most probable token of each row of logits [n, V] but the mask."""
    logits[:, mask_id] = -torch.inf
    return logits.argmax(dim=1)
