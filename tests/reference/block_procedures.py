# SPDX-License-Identifier: Apache-2.0
"""Reference decoding of one request by a model that writes block after block, greedy.

A position sees all blocks up to its own. SDAR (arXiv 2510.06303), LLaDA2.0
(2512.15745), Tiny-A2D's bd3lm models (github.com/ZHZisZZ/dllm), and with a shift
Fast-dLLM v2 (2509.26328). Or all that is left of the active block is causal:
Nemotron-Labs-Diffusion (vLLM pull request #48279). Every forward computes the whole
row anew: no keys are kept, so nothing can be stale. Conventions are those of
`reference.procedures`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from reference.network import TinyModel, block_causal, causal_context
from reference.procedures import (
    FOREVER,
    ReferenceResult,
    Statistics,
    row_statistics,
)
from reference.rules import Rule, Step, View, static_schedule


def generate_blocks(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    rule: Rule,
    steps_per_block: int | None = None,
    origin: str = "start",
    context: str = "blocks",
    shift: int = 0,
    seeds: bool | None = None,
    sub_block_length: int | None = None,
    schedule: str = "even",
    max_model_len: int | None = None,
    forbid_mask: bool = True,
    mask_id: int | None = None,
    eos_ids: Collection[int] | None = None,
    eos_stop: bool = True,
    together: int = 1,
    eos_cuts: bool = False,
    canvas: Sequence[int | None] | None = None,
    pad_ids: Collection[int] = (),
    observe: Callable[[View, list[int]], None] | None = None,
) -> ReferenceResult:
    """Decode one request block by block; what is written never changes.

    `forwards` counts those up to the one that made the last returned token final. With
    a rule that writes in every step they are all that were computed.

    Args:
        max_tokens: most tokens returned; whole blocks are denoised, and cut.
        steps_per_block: S of the schedule, at most the block length B, the default.
        origin: "start": blocks are counted from position 0, and the prompt's last
            P mod B tokens share the first generated block. "prompt": a block ends
            where the prompt does, and the prompt's first block is the shorter one.
        context: what positions left of the active block see. "blocks": all blocks up
            to their own. "causal": no position to their right.
        shift: the logits for position p are those of row p - shift.
        seeds: a block whose first position is masked begins with a forward over the
            finished blocks alone, whose last row predicts that position (the seed). It
            is the block's step 0 and writes one token, whatever the rule; `observe`
            sees it as a view of one position. If it chose the mask id, the block's
            other steps predict that position from its own row. The default is with a
            shift only.
        sub_block_length: only masks of the leftmost part of this length (counted from
            the block's start) that has any are candidates; None is the whole block.
        schedule: commits in step j of a block. "even": B // S, and one more in the
            first B mod S steps, whatever the number of masks. "rounded": the masks
            left over the steps left, rounded (half to even), at least 1 (the source
            drops steps of none). After S steps: B.
        max_model_len: no position from here on exists; it may cut the last block.
        forbid_mask: ban the mask id. If False, a position that chooses it stays masked,
            and if the rule ends by its schedule, masks left after S steps are final.
        mask_id, eos_ids: default to the checkpoint's.
        eos_stop: end with the first EOS, included, once all left of it is final.
        together: blocks that are decided together, beginning with the one that holds
            the first mask; no block sees the ones behind it. The last ones end with
            the block in which the text does.
        eos_cuts: nothing exists behind an EOS once it is written.
        canvas: `max_tokens` tokens that stand from the start, None where the model is
            to write; no position from there on exists. They never change, a block sees
            its own and those to its left, and no end of the text is written left of
            the last of them. A block without masks takes no forward.
        pad_ids: are not written there either.
        observe: called with the view and the chosen offsets, before the commit.

    Raises:
        ValueError: an option is unknown or the lengths do not fit.
        RuntimeError: no progress: the mask id is a rule's whole choice.
    """
    steps = block_length if steps_per_block is None else steps_per_block
    seeds = shift == 1 if seeds is None else seeds
    if origin not in ("start", "prompt"):
        raise ValueError(f"origin {origin!r} is not 'start' or 'prompt'")
    if context not in ("blocks", "causal"):
        raise ValueError(f"context {context!r} is not 'blocks' or 'causal'")
    if schedule not in ("even", "rounded"):
        raise ValueError(f"schedule {schedule!r} is not 'even' or 'rounded'")
    if not 1 <= steps <= block_length:
        raise ValueError("steps_per_block must be from 1 to block_length")
    if (shift or seeds) and not prompt_ids:
        raise ValueError("with a shift or seeds, the first token needs a prompt")
    mask_id = model.mask_id if mask_id is None else mask_id
    banned = mask_id if forbid_mask else None
    if eos_ids is None:
        eos_ids = {model.eos_id}

    prompt_end = len(prompt_ids)
    first_border = prompt_end % block_length if origin == "prompt" else 0
    text_end = prompt_end + max_tokens
    limit = text_end + block_length if max_model_len is None else max_model_len
    text_end = min(text_end, limit)
    if together > 1:
        whole = -(-(text_end - first_border) // block_length) * block_length
        limit = min(limit, first_border + whole)
    given = list(canvas or [])
    if canvas is not None:
        limit = text_end
    fixed = {prompt_end + i for i, token in enumerate(given) if token is not None}
    ends_from = max(fixed, default=-1) + 1
    row = list(prompt_ids)
    masked = [False] * prompt_end  # not `== mask_id`: a prompt may hold that id
    set_at = [-1] * prompt_end
    open_to_change: set[int] = set()  # by a rule that rewrites
    forwards = 0

    def predict(first: int, stop: int, row_end: int) -> Statistics:
        """Predictions for [first, stop) of the active block, which begins at `first`.

        They are made from the row cut at `row_end`.
        """
        if context == "causal":
            visible = causal_context(row_end, first)
        else:
            visible = block_causal(row_end, block_length, first_border)
        logits = model.forward(row[:row_end], visible=visible)
        left, lowest = shift, first if seeds else 0
        if row_end == first:  # a seed's row ends before it
            left, lowest = 1, 0
        sources = [max(p - left, lowest) for p in range(first, stop)]
        stats = row_statistics(logits[sources], banned)
        early = [p - first for p in range(first, stop) if p < ends_from]
        for p in early:
            left = logits[sources[p]].float().clone()
            left[[*eos_ids, *pad_ids, mask_id]] = -torch.inf
            stats.argmax[p] = left.argmax()
            stats.confidence[p] = stats.probabilities[p, stats.argmax[p]]
        for p in fixed & set(range(first, stop)):
            stats.argmax[p - first] = row[p]
        return stats

    def final_end() -> int | None:
        """One past the last token of the text, once all up to it is final."""
        for p in range(prompt_end, min(len(row), text_end)):
            if masked[p] or p in open_to_change:
                return None
            if eos_stop and row[p] in eos_ids and p >= ends_from - 1:
                return p + 1
        return text_end if len(row) >= text_end else None

    end = first_border + (prompt_end - first_border) // block_length * block_length
    while final_end() is None:
        start, end = end, min(end + together * block_length, limit)
        new = end - len(row)
        row += [mask_id] * new
        masked += [True] * new
        for p in fixed & set(range(end - new, end)):
            row[p], masked[p] = given[p - prompt_end], False
        set_at += [-1] * new

        step = 0
        decision = Step([])
        seeded = False
        if rule.rewrites:
            open_to_change = set(range(max(start, prompt_end), end))
        while (decision.hold or any(masked[start:end])) and final_end() is None:
            if not forbid_mask and rule.ends_by_schedule and step >= steps:
                break
            masks = [p for p in range(start, end) if masked[p]]
            is_seed = seeds and step == 0 and masks[0] == start
            if is_seed:
                first, stop = start, start + 1
                stats = predict(first, stop, row_end=start)
                candidates = [start]
            else:
                first, stop = start, end
                stats = predict(first, stop, row_end=end)
                candidates = leftmost_part(masks, start, sub_block_length)
            if seeded:  # it was handed out: it stays
                stats.argmax[0] = row[start]
            view = View(
                masked=torch.tensor([p in candidates for p in range(first, stop)]),
                argmax=stats.argmax,
                confidence=stats.confidence,
                margin=stats.margin,
                entropy=stats.entropy,
                probabilities=stats.probabilities,
                first=first - prompt_end,
                forward=forwards,
                scheduled=commits(schedule, block_length, steps, step, len(masks)),
                step=step,
                steps=steps,
                tokens=torch.tensor(row[first:stop]),
                decided=torch.tensor(
                    [p >= prompt_end and not masked[p] for p in range(first, stop)]
                ),
            )
            if is_seed and int(stats.argmax[0]) != mask_id:
                seeded = True
                open_to_change.discard(start)
            decision = Step([0]) if is_seed else rule.step(view)
            chosen = decision.commit
            if observe is not None:
                observe(view, chosen)

            written = 0
            for offset in [*chosen, *decision.edit]:
                if first + offset in fixed:
                    continue
                part = chosen if offset in chosen else decision.edit
                instead = isinstance(part, dict)
                token = part[offset] if instead else int(view.argmax[offset])
                if token == mask_id and offset in decision.edit:
                    row[first + offset] = mask_id
                    masked[first + offset] = True
                    written += 1
                elif token != mask_id:
                    row[first + offset] = token
                    masked[first + offset] = False
                    set_at[first + offset] = forwards
                    written += 1
            for offset in decision.remask:
                if first + offset in fixed:
                    continue
                row[first + offset] = mask_id
                masked[first + offset] = True
            ends = [i for i in chosen if eos_cuts and row[first + i] in eos_ids]
            if ends:
                end = limit = text_end = first + min(ends) + 1
                del row[end:], masked[end:], set_at[end:]
            forwards += 1
            step += 1
            is_stuck = masks and not written and not is_seed
            if is_stuck and not rule.ends_by_schedule:
                raise RuntimeError("no progress: the mask id is the only choice")
            if step > FOREVER * block_length:
                raise RuntimeError("no end: masks come and go")

        # Masks that are left here are text, as in the sources.
        masked[start:end] = [False] * (end - start)
        if final_end() is None:  # else a seed was the text's end
            for p in open_to_change:
                set_at[p] = forwards - 1
            open_to_change = set()

    stop = final_end()
    return ReferenceResult(row[prompt_end:stop], forwards, set_at[prompt_end:stop])


def commits(
    schedule: str, block_length: int, steps: int, step: int, masks_left: int
) -> int:
    """How many commits a block's schedule has for a step; see `generate_blocks`."""
    if step >= steps:
        return block_length
    if schedule == "even":
        return static_schedule(block_length, steps)[step]
    return max(1, round(masks_left / (steps - step)))


def leftmost_part(masks: list[int], start: int, length: int | None) -> list[int]:
    """The masks that share the leftmost one's part; parts of `length` from `start`."""
    if length is None or not masks:
        return masks
    part_end = start + ((masks[0] - start) // length + 1) * length
    return [p for p in masks if p < part_end]
