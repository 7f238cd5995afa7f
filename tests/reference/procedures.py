# SPDX-License-Identifier: Apache-2.0
"""Reference decoding of one request by a full-attention diffusion model, greedy.

The rules of `reference.rules`, under the KV policies of
`reference.cached_procedures`, with end-of-text prediction (Learn2PD, 2509.25188).
Plain loops over one row; every engine path is compared with these token for token.

Conventions: ties go to the lowest position and the lowest token id; confidences
are float32 probabilities of untempered logits. The loop is one function of one file on
purpose: it is to be read from top to bottom beside the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from reference.cached_procedures import ALL_CACHES, CACHES, leading, step_span
from reference.growing import Growing
from reference.layers import KVStore
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from reference.rules import (
    DREAM_ALGS,
    STATIC_MODES,
    Rule,
    Step,
    View,
    dream,
    factor,
    float32,
    learn2pd,
    static,
    static_schedule,
    threshold,
    top_k,
)

__all__ = [
    "CACHES",
    "DREAM_ALGS",
    "STATIC_MODES",
    "ReferenceResult",
    "Rule",
    "Statistics",
    "View",
    "dream",
    "factor",
    "generate",
    "learn2pd",
    "row_statistics",
    "static",
    "static_schedule",
    "threshold",
    "top_k",
]


EOTP_MODES = ("first", "block", "canvas", "paper", "written")

FOREVER = 50
"""Steps per position that only a block without an end takes."""


class Statistics(NamedTuple):
    """What one forward says about its n rows; each tensor [n], float32 or int64."""

    argmax: torch.Tensor
    confidence: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor
    probabilities: torch.Tensor
    """[n, vocab]."""


def row_statistics(logits: torch.Tensor, banned_id: int | None) -> Statistics:
    """Statistics of logits [n, vocab]; `banned_id` never wins and gets no mass."""
    logits = logits.float().clone()
    if banned_id is not None:
        logits[:, banned_id] = -torch.inf
    argmax = logits.argmax(dim=-1)  # documented: the first of equal maxima
    probabilities = logits.softmax(dim=-1)
    confidence = probabilities.gather(-1, argmax[:, None])[:, 0]
    top2 = probabilities.topk(2, dim=-1).values
    entropy = torch.special.entr(probabilities).sum(dim=-1)  # entr(0) = 0
    margin = top2[:, 0] - top2[:, 1]
    return Statistics(argmax, confidence, margin, entropy, probabilities)


@dataclass
class ReferenceResult:
    """The generated tokens, how many forwards they took, and when each was set.

    `tokens` has gen_length entries unless the request was cut: by `eos_stop`, after
    the first EOS, which **is included, as the last token**; or by EoTP, where the
    last token is the one at the cut (a merely predicted EOS may become another).
    `step_of_position[i]` is the index of the forward, from 0, whose commit made
    tokens[i] final; -1 if it is still the mask id.
    """

    tokens: list[int]
    forwards: int
    step_of_position: list[int]


def generate(
    model: TinyLLaDA | TinyModel,
    prompt_ids: list[int],
    *,
    gen_length: int,
    block_length: int,
    rule: Rule,
    cache: str = "none",
    cache_options: dict[str, int] | None = None,
    whole_block: bool = False,
    steps: int | None = None,
    shift: int = 0,
    mask_id: int | None = None,
    eos_id: int | None = None,
    forbid_mask: bool = True,
    eos_stop: bool = True,
    eotp: str | None = None,
    eot_threshold: float = 0.9,
    growing: Growing | None = None,
    canvas: Sequence[int | None] | None = None,
    observe: Callable[[View, list[int]], None] | None = None,
) -> ReferenceResult:
    """Decode one request greedily; blocks left to right from the prompt's end.

    Args:
        cache: "none" recomputes the whole row every step. "prefix" and "dual" do so
            in the first step of a block only; its later steps recompute the block
            and all right of it ("prefix") or the block alone ("dual"). Keys of rows
            not recomputed stay as they are. "vicinity" and "window" take
            `cache_options`; see `cached_procedures.step_span`.
        whole_block: the rule reads or rewrites decided positions, so that "window"
            computes all of the block.
        steps: total steps of the schedule, steps // num_blocks for each block; default
            gen_length (one token a step). Rules without a schedule ignore it.
        shift: the logits for position p are those of row p - shift (0 or 1; the very
            first position's are its own row's). The row left of a block, which
            predicts its first position, is recomputed with the block.
        mask_id, eos_id: default to the checkpoint's.
        forbid_mask: ban the mask id. False is upstream's behaviour: a position that
            chooses the mask id uses up its commit and stays masked. Masks that a
            static schedule leaves behind remain candidates in later blocks, for as
            long as their rows are computed.
        eos_stop: end the request as soon as an EOS has no masked position left of
            it; what lies right of the first EOS is dropped.
        eotp: end-of-text prediction after every step's commits. None: off. "first":
            cut the canvas after the first EOS committed in this step; if there is
            none, after the first position of the active block that is still masked
            and whose argmax is EOS with confidence >= eot_threshold. "paper": the
            second branch takes the most confident one of *all* masked positions
            whose rows this forward computed, whatever its confidence. "block": as
            "first", but the cut is at the end of the active block. "canvas": as
            "block"; where that finds no end, the first position predicted by a row
            right of the active block, if this forward computed such rows, whose argmax
            is EOS with confidence >= eot_threshold: the cut is at the end of its block.
            "written": the first branch of "first" alone.
        growing: begin with a short canvas that grows, up to gen_length; its tokens are
            all if it does not grow as far.
        canvas: `gen_length` tokens that stand from the start, None where the model is
            to write. They never change; no end of the text is written or predicted
            left of the last of them, and nothing is cut there. A block without masks
            takes no forward. With "window", a block's rows begin with the block, also
            where that begins with such tokens.
        observe: called with the view and the chosen offsets, before the commit.

    Raises:
        ValueError: an option is unknown or the lengths do not fit.
        RuntimeError: a rule other than static can make no progress
            (forbid_mask=False and the mask id is its whole choice).
    """
    if cache not in ALL_CACHES:
        raise ValueError(f"cache {cache!r} is not one of {ALL_CACHES}")
    if eotp not in (None, *EOTP_MODES):
        raise ValueError(f"eotp {eotp!r} is not None or one of {EOTP_MODES}")
    if gen_length % block_length and canvas is None:
        raise ValueError("gen_length must be a multiple of block_length")
    mask_id = model.mask_id if mask_id is None else mask_id
    eos_id = model.eos_id if eos_id is None else eos_id
    num_blocks = -(-gen_length // block_length)
    steps_per_block = (gen_length if steps is None else steps) // num_blocks
    if steps_per_block < 1:
        raise ValueError("steps must be at least the number of blocks")

    prompt_end = len(prompt_ids)
    width = gen_length
    if growing is not None:
        width = growing.grown(0, growing.initial, block_length, gen_length)
    row = list(prompt_ids) + [mask_id] * width
    given = list(canvas or [])
    for offset, token in enumerate(given):
        row[prompt_end + offset] = mask_id if token is None else token
    fixed = {prompt_end + i for i, token in enumerate(given) if token is not None}
    ends_from = max(fixed, default=-1) + 1
    set_at = [-1] * len(row)
    forwards = 0

    def result(end: int) -> ReferenceResult:
        return ReferenceResult(row[prompt_end:end], forwards, set_at[prompt_end:end])

    for block in range(num_blocks):
        start = prompt_end + block * block_length
        num_masked = row[start : start + block_length].count(mask_id)
        if num_masked == 0:
            continue
        schedule = static_schedule(num_masked, steps_per_block)
        last_step = rule.own_steps(num_masked) if rule.own_steps else steps_per_block
        store: KVStore | None = None
        step = 0
        phase, computed, is_cut = start, 0, False
        decision = Step([])
        while decision.hold or mask_id in row[start : start + block_length]:
            scheduled = schedule[step] if step < len(schedule) else 0
            if rule.ends_by_schedule and step >= last_step:
                if not forbid_mask and cache != "window":
                    break
                # Some of the block could not be written in time: it is not left so.
                scheduled = block_length
            end = min(start + block_length, len(row))

            if cache != "none" and step == 0:
                store = model.new_store(len(row))
            first_row, end_row, low, high, seen, refresh, writable = step_span(
                cache,
                cache_options or {},
                step=step,
                is_first_block=block == 0,
                start=start,
                end=end,
                length=len(row),
                masks=[p for p in range(start, len(row)) if row[p] == mask_id],
                phase=phase,
                computed=computed,
                always=is_cut and bool((cache_options or {}).get("early_stop")),
                whole_block=whole_block or rule.rewrites,
                shift=shift,
            )
            if refresh and canvas is not None and step == 0:
                phase = start
            elif refresh:
                phase = row.index(mask_id, start) if mask_id in row[start:end] else end
            computed = max(computed, end_row)
            logits = model.forward(
                row[first_row:end_row],
                list(range(first_row, end_row)),
                leading(store, seen),
            )
            sources = [max(p - shift, 0) - first_row for p in range(low, high)]
            early = [p - low for p in range(low, high) if p < ends_from]
            stats = row_statistics(logits[sources], mask_id if forbid_mask else None)
            stats = _without_end(stats, logits[sources], early, eos_id, mask_id)
            for p in fixed & set(range(low, high)):
                stats.argmax[p - low] = row[p]

            if growing is not None and step == 0 and len(row) < prompt_end + gen_length:
                ahead = [
                    p for p in range(start, len(row)) if p < end or p >= end + shift
                ]
                sure = [float(stats.confidence[p - low]) for p in ahead]
                ends = [int(stats.argmax[p - low]) == eos_id for p in ahead]
                lacks = growing.lacks(ends, sure)
                sees_end = eotp == "canvas" and any(
                    is_end and c >= float32(eot_threshold)
                    for is_end, c in zip(ends, sure, strict=True)
                )
                if lacks and not sees_end:
                    now = len(row) - start
                    most = prompt_end + gen_length - start
                    wider = growing.grown(now, lacks, block_length, most)
                    row += [mask_id] * (start + wider - len(row))
                    set_at += [-1] * (len(row) - len(set_at))
                    forwards += 1
                    continue

            # Masks left behind by earlier blocks widen the window to the left.
            left_over = [
                p for p in range(max(low, prompt_end), start) if row[p] == mask_id
            ]
            first = min([start, *left_over])
            last = min(high, writable)
            known = [low <= p < last for p in range(first, end)]
            view = View(
                masked=torch.tensor(
                    [row[p] == mask_id and low <= p < last for p in range(first, end)]
                ),
                argmax=_placed(stats.argmax, known, low - first),
                confidence=_placed(stats.confidence, known, low - first),
                margin=_placed(stats.margin, known, low - first),
                entropy=_placed(stats.entropy, known, low - first),
                probabilities=_placed(stats.probabilities, known, low - first),
                first=first - prompt_end,
                forward=forwards,
                scheduled=scheduled,
                step=step,
                steps=steps_per_block,
                tokens=torch.tensor(row[first:end]),
                decided=torch.tensor([row[p] != mask_id for p in range(first, end)]),
                kept=row[max(first, last) : end].count(mask_id),
            )
            decision = rule.step(view)
            chosen = decision.commit
            if observe is not None:
                observe(view, list(chosen))

            committed = []
            for offset in [*chosen, *decision.edit]:
                if first + offset in fixed:
                    continue
                part = chosen if offset in chosen else decision.edit
                instead = isinstance(part, dict)
                token = part[offset] if instead else int(view.argmax[offset])
                if token != mask_id:
                    row[first + offset] = token
                    set_at[first + offset] = forwards
                    committed.append(first + offset)
                elif offset in decision.edit:
                    row[first + offset] = mask_id
                    committed.append(first + offset)
            for offset in decision.remask:
                if first + offset not in fixed:
                    row[first + offset] = mask_id
            forwards += 1
            step += 1
            stuck = view.masked.any() and not committed
            if stuck and not rule.ends_by_schedule:
                raise RuntimeError("no progress: the mask id is the only choice")
            if step > FOREVER * block_length:
                raise RuntimeError("no end: masks come and go")

            if eotp is not None:
                revealed = [p for p in committed if row[p] == eos_id and p >= ends_from]
                predicted = {
                    p: stats.confidence[p - low]
                    for p in range(max(start, low), high)
                    if row[p] == mask_id
                    and stats.argmax[p - low] == eos_id
                    and not last <= p < end
                }
                cut = len(row)
                if revealed:
                    cut = min(revealed) + 1
                elif eotp == "written":
                    pass
                elif eotp == "paper" and predicted:
                    cut = max(predicted, key=lambda p: (predicted[p], -p)) + 1
                elif eotp != "paper":
                    sure = [
                        p
                        for p, c in predicted.items()
                        if p < end and c >= float32(eot_threshold)
                    ]
                    cut = min(sure) + 1 if sure else cut
                # An end that may be rewritten keeps the block whole.
                keeps = eotp == "written" and rule.rewrites
                if (keeps or eotp in ("block", "canvas")) and cut < len(row):
                    cut = end
                elif eotp == "canvas":
                    far = [
                        p
                        for p, c in predicted.items()
                        if p >= end + shift and c >= float32(eot_threshold)
                    ]
                    if far:
                        blocks = (min(far) - start) // block_length + 1
                        cut = min(cut, start + blocks * block_length)
                if cut < ends_from:
                    cut = len(row)
                is_cut |= cut < len(row)
                del row[cut:], set_at[cut:]
                if store is not None:
                    store.truncate(cut)

            if rule.rewrites:
                if decision.hold or mask_id in row[start:end]:
                    continue
                set_at[start:end] = [forwards - 1] * (end - start)
            if eos_stop:
                stop = _eos_end(row, prompt_end, mask_id, eos_id, ends_from - 1)
                if stop is not None:
                    return result(stop)
    return result(len(row))


def _placed(values: torch.Tensor, known: list[bool], shift: int) -> torch.Tensor:
    """`values` of the positions from `shift` on; 0 where a position is not known."""
    placed = torch.zeros(len(known), *values.shape[1:], dtype=values.dtype)
    for i, is_known in enumerate(known):
        if is_known:
            placed[i] = values[i - shift]
    return placed


def _without_end(
    stats: Statistics,
    logits: torch.Tensor,
    rows: list[int],
    eos_id: int,
    mask_id: int,
) -> Statistics:
    """The statistics, but in some rows the choice is the best besides the EOS.

    Its confidence is that under the whole distribution.
    """
    if rows:
        left = logits[rows].float().clone()
        left[:, [eos_id, mask_id]] = -torch.inf
        best = left.argmax(dim=-1)
        stats.argmax[rows] = best
        stats.confidence[rows] = stats.probabilities[rows, best]
    return stats


def _eos_end(
    row: list[int], prompt_end: int, mask_id: int, eos_id: int, least: int = 0
) -> int | None:
    """One past the first generated EOS from `least` on, if no mask is left of it."""
    for p in range(prompt_end, len(row)):
        if row[p] == mask_id:
            return None
        if row[p] == eos_id and p >= least:
            return p + 1
    return None
