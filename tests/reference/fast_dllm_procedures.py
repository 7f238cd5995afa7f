# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM's two loops that keep keys inside a block, for models with a shift, greedy.

Dream with a prefix or a dual cache (arXiv 2505.22618), and Fast-dLLM v2 with its
sub-block cache (2509.26328). Unlike `procedures.generate`, neither ever computes the
row left of the block along with a block: each sees to it that the one token that this
row predicts is written first. Conventions are those of `reference.procedures`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from reference.block_procedures import commits, leftmost_part
from reference.cached_procedures import leading
from reference.llada import TinyLLaDA
from reference.network import TinyModel, block_causal
from reference.procedures import ReferenceResult, Statistics, row_statistics
from reference.rules import Rule, Step, View

Distribution = Callable[[torch.Tensor], torch.Tensor]
"""Logits [n, V] -> logits [n, V], after temperature, top-k and top-p."""
Draw = Callable[[torch.Tensor, list[int], int], torch.Tensor]
"""Filtered logits [n, V], their positions and the block's step -> n tokens."""


@dataclass
class CachedResult(ReferenceResult):
    """`rows[i]`: first and one past the last row that forward i computed."""

    rows: list[tuple[int, int]] = field(default_factory=list)


def generate_dream(
    model: TinyModel | TinyLLaDA,
    prompt_ids: list[int],
    *,
    gen_length: int,
    block_length: int,
    rule: Rule,
    cache: str,
    steps: int | None = None,
    forbid_mask: bool = False,
    eos_stop: bool = True,
    distribution: Distribution | None = None,
    draw: Draw | None = None,
    observe: Callable[[View, list[int]], None] | None = None,
) -> CachedResult:
    """Decode one request of a model with a shift of one as Fast-dLLM's Dream loop does.

    gen_length / block_length blocks of S = steps / blocks steps each. In each block:

    1. **The opening**, step 0 of the schedule. Everything is computed, and the block's
       first position is written, it alone and whatever its confidence, with the token
       of the row to its left. It has used up step 0: what the schedule or the rule
       would have written there is not.
    2. **Steps 1 to S - 1.** Computed are the rows [start, end of the canvas)
       ("prefix") or those of the block ("dual"), never the row left of it, so keys left
       of the block, and with "dual" right of it, are the opening's. The shift is
       applied among the computed rows: position p is predicted by row p - 1, and the
       block's first one, which has none to its left, by its own row; this is read only
       if the opening chose the mask id. Candidates are the block's masks. The rule sees
       `step` i of S, so Dream's share is 1 - t_(i+1) / t_i of the masks that are left
       (which the opening made one fewer), and all of them in step S - 1. An even
       schedule, which the source does not have here, has step i's part of B in step i,
       and in step S - 1 too all that is left.
    3. A block is over when no mask is left, or, if the rule ends by its schedule,
       after S steps: masks that stand then are text. With S = 1 that is all of the
       block but its first token. The threshold rule (the source's alg
       `confidence_threshold`) knows no last step.

    The source's loop has two algs, `confidence_threshold` and the entropy's: it takes
    the entropy under every other name. It computes a forward more, and ignores it,
    where the opening filled the block and where masks outlast S; these are not counted.

    Args:
        rule: `dream(...)`, `threshold(...)` or another; none that rewrites.
        cache: "prefix" or "dual".
        steps: over the whole canvas; default gen_length.
        forbid_mask: ban the mask id, which the source does not.
        eos_stop: as in `procedures.generate`. The source goes on to the canvas' end.
        distribution: temperature and filters; confidence, margin and entropy are those
            of its outcome. None is the model's own.
        draw: chooses tokens, in the opening too; the default takes the most probable.

    Raises:
        ValueError: an option is unknown or the lengths do not fit.
        RuntimeError: no progress: the mask id is the rule's whole choice.
    """
    if cache not in ("prefix", "dual"):
        raise ValueError(f"cache {cache!r} is not 'prefix' or 'dual'")
    if gen_length % block_length:
        raise ValueError("gen_length must be a multiple of block_length")
    num_blocks = gen_length // block_length
    steps_per_block = (gen_length if steps is None else steps) // num_blocks
    if steps_per_block < 1:
        raise ValueError("steps must be at least the number of blocks")
    mask_id, eos_id = model.mask_id, model.eos_id
    banned = mask_id if forbid_mask else None

    prompt_end = len(prompt_ids)
    row = list(prompt_ids) + [mask_id] * gen_length
    set_at = [-1] * len(row)
    rows: list[tuple[int, int]] = []

    def predict(logits: torch.Tensor, positions: list[int], step: int) -> Statistics:
        """Statistics of the logits [n, V] that predict these positions."""
        if distribution is not None:
            logits = distribution(logits)
        stats = row_statistics(logits, banned)
        if draw is None:
            return stats
        tokens = draw(logits, positions, step)
        confidence = stats.probabilities.gather(-1, tokens[:, None])[:, 0]
        return stats._replace(argmax=tokens, confidence=confidence)

    def write(position: int, token: int) -> bool:
        if token != mask_id:
            row[position] = token
            set_at[position] = len(rows) - 1
        return token != mask_id

    def text_end(open_from: int) -> int | None:
        """One past the first EOS, if no mask that may change is left of it."""
        for p in range(prompt_end, len(row)):
            if row[p] == mask_id and p >= open_from:
                return None
            if row[p] == eos_id and eos_stop:
                return p + 1
        return None

    for start in range(prompt_end, len(row), block_length):
        end = start + block_length
        store = model.new_store(len(row))
        logits = model.forward(row, list(range(len(row))), store)
        rows.append((0, len(row)))
        left = max(start - 1, 0)
        opening = predict(logits[left : left + 1], [start], 0)
        write(start, int(opening.argmax[0]))
        step = 1
        while mask_id in row[start:end] and text_end(start) is None:
            if rule.ends_by_schedule and step >= steps_per_block:
                break
            stop = len(row) if cache == "prefix" else end
            logits = model.forward(row[start:stop], list(range(start, stop)), store)
            rows.append((start, stop))
            shifted = torch.cat([logits[:1], logits[:-1]])[:block_length]
            stats = predict(shifted, list(range(start, end)), step)
            scheduled = commits("even", block_length, steps_per_block, step, 0)
            if step >= steps_per_block - 1:
                scheduled = block_length
            view = View(
                masked=torch.tensor([row[p] == mask_id for p in range(start, end)]),
                argmax=stats.argmax,
                confidence=stats.confidence,
                margin=stats.margin,
                entropy=stats.entropy,
                probabilities=stats.probabilities,
                first=start - prompt_end,
                forward=len(rows) - 1,
                scheduled=scheduled,
                step=step,
                steps=steps_per_block,
                tokens=torch.tensor(row[start:end]),
                decided=torch.tensor([row[p] != mask_id for p in range(start, end)]),
            )
            chosen = list(rule.step(view).commit)
            if observe is not None:
                observe(view, chosen)
            written = [write(start + i, int(view.argmax[i])) for i in chosen]
            step += 1
            if not any(written) and not rule.ends_by_schedule:
                raise RuntimeError("no progress: the mask id is the only choice")
        stop_at = text_end(end)
        if stop_at is not None:
            break
    else:
        stop_at = len(row)
    return CachedResult(
        row[prompt_end:stop_at], len(rows), set_at[prompt_end:stop_at], rows
    )


def generate_sub_blocks(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    sub_block_length: int,
    rule: Rule,
    steps_per_block: int | None = None,
    shift: int = 1,
    refresh: bool = False,
    max_model_len: int | None = None,
    forbid_mask: bool = True,
    eos_ids: Collection[int] | None = None,
    eos_stop: bool = True,
    observe: Callable[[View, list[int]], None] | None = None,
) -> CachedResult:
    """Decode one request as Fast-dLLM v2 does with `use_block_cache`.

    Blocks are counted from position 0, a shift of one, a block that begins with a mask
    begins with the seed that the finished blocks' last row predicts: all as
    `generate_blocks` has it. In a block, sub-blocks are written from left to right. A
    step of sub-block [a, b) computes

    - the **whole block**, and keeps its keys, if the block has no keys yet (its first
      step; what an earlier block has left is not reused) or if a is still masked: the
      row that predicts a lies left of the sub-block (a seed that chose the mask id
      leaves the block's first position to its own row);
    - otherwise only the **rows of the sub-block**, the prompt's in it included, over
      the keys of the finished blocks and all of the block's. The rows' own keys replace
      those that are kept; the others are as the last whole step left them, when more of
      the sub-block was masked.

    Position p is predicted by row p - 1 in both. A finished block is computed once more
    as a whole, over itself and what is left of it; its final keys come from there. That
    forward is the next block's seed, so it is counted as the next block's step 0; one
    that follows the last token is not counted, nor is the prompt's own where its tail
    shares the first block.

    Args:
        max_tokens, steps_per_block, max_model_len, eos_ids, eos_stop, observe: as in
            `generate_blocks`.
        rule: none that rewrites. It sees the whole block; outside of the rows that
            were computed, its statistics are 0.
        shift: 0 is what the source does not have: no seeds, each position predicted by
            its own row, and the same rows computed.
        refresh: compute the whole block in every step, which is what the source does
            without the option: the result is `generate_blocks`'.
        forbid_mask: ban the mask id. If False, a position that chooses it stays masked.

    Returns:
        `rows` are those of each forward; a seed's are the finished block's.

    Raises:
        ValueError: an option is unknown or the lengths do not fit.
        RuntimeError: no progress: the mask id is a rule's whole choice.
    """
    steps = block_length if steps_per_block is None else steps_per_block
    if not 1 <= steps <= block_length:
        raise ValueError("steps_per_block must be from 1 to block_length")
    if shift and not prompt_ids:
        raise ValueError("with a shift, the first token needs a prompt")
    mask_id = model.mask_id
    banned = mask_id if forbid_mask else None
    if eos_ids is None:
        eos_ids = {model.eos_id}

    prompt_end = len(prompt_ids)
    limit = -(-(prompt_end + max_tokens) // block_length) * block_length
    limit = limit if max_model_len is None else min(limit, max_model_len)
    text_end = min(prompt_end + max_tokens, limit)
    row = list(prompt_ids)
    masked = [False] * prompt_end
    set_at = [-1] * prompt_end
    rows: list[tuple[int, int]] = []
    store = model.new_store(limit)

    def compute(first: int, stop: int, seen: int) -> torch.Tensor:
        """Logits of the rows [first, stop), which see the keys 0 to seen - 1."""
        return model.forward(
            row[first:stop], list(range(first, stop)), leading(store, seen)
        )

    def final_end() -> int | None:
        """One past the last token of the text, once all up to it is final."""
        for p in range(prompt_end, min(len(row), text_end)):
            if masked[p]:
                return None
            if eos_stop and row[p] in eos_ids:
                return p + 1
        return text_end if len(row) >= text_end else None

    def write(position: int, token: int) -> bool:
        if token != mask_id:
            row[position] = token
            masked[position] = False
            set_at[position] = len(rows) - 1
        return token != mask_id

    start = prompt_end // block_length * block_length
    last_logits = None
    if start:
        visible = block_causal(start, block_length)
        final_rows = list(range(start))
        last_logits = model.forward(
            row[:start], final_rows, leading(store, start), visible
        )[-1:]
    finished = (0, start)
    while final_end() is None:
        end = min(start + block_length, limit)
        new = end - len(row)
        row += [mask_id] * new
        masked += [True] * new
        set_at += [-1] * new
        step = 0
        if masked[start] and shift:
            assert last_logits is not None
            rows.append(finished)
            stats = row_statistics(last_logits, banned)
            write(start, int(stats.argmax[0]))
            step = 1
        has_keys = False
        idle = 0
        while any(masked[start:end]) and final_end() is None:
            if not forbid_mask and rule.ends_by_schedule and step >= steps:
                break
            masks = [p for p in range(start, end) if masked[p]]
            candidates = leftmost_part(masks, start, sub_block_length)
            part = (candidates[0] - start) // sub_block_length * sub_block_length
            first = start + part
            stop = min(first + sub_block_length, end)
            if refresh or not has_keys or masked[first]:
                first, stop, has_keys = start, end, True
            logits = compute(first, stop, end)
            rows.append((first, stop))
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            stats = row_statistics(logits, banned)

            view = View(
                masked=torch.tensor([p in candidates for p in range(start, end)]),
                argmax=_placed(stats.argmax, end - start, first - start),
                confidence=_placed(stats.confidence, end - start, first - start),
                margin=_placed(stats.margin, end - start, first - start),
                entropy=_placed(stats.entropy, end - start, first - start),
                first=start - prompt_end,
                forward=len(rows) - 1,
                scheduled=commits("even", block_length, steps, step, len(masks)),
                step=step,
                steps=steps,
                tokens=torch.tensor(row[start:end]),
                decided=torch.tensor(
                    [p >= prompt_end and not masked[p] for p in range(start, end)]
                ),
            )
            decision: Step = rule.step(view)
            chosen = list(decision.commit)
            if observe is not None:
                observe(view, chosen)
            written = [write(start + i, int(view.argmax[i])) for i in chosen]
            step += 1
            # A step of the block and one of the sub-block may choose differently.
            idle = 0 if any(written) else idle + 1
            if idle > 1 and not rule.ends_by_schedule:
                raise RuntimeError("no progress: the mask id is the only choice")
        masked[start:end] = [False] * (end - start)  # masks that are left are text
        if final_end() is None:
            last_logits = compute(start, end, end)[-1:]
            finished = (start, end)
            start = end
    stop_at = final_end()
    return CachedResult(
        row[prompt_end:stop_at], len(rows), set_at[prompt_end:stop_at], rows
    )


def _placed(values: torch.Tensor, width: int, offset: int) -> torch.Tensor:
    """[width, ...]: `values` from `offset` on, 0 elsewhere."""
    placed = torch.zeros(width, *values.shape[1:], dtype=values.dtype)
    placed[offset : offset + len(values)] = values
    return placed
