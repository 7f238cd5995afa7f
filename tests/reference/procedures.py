# SPDX-License-Identifier: Apache-2.0
"""Reference decoding of one request by a full-attention diffusion model, greedy.

Static schedules (LLaDA, arXiv 2502.09992), threshold and factor with prefix or
dual cache (Fast-dLLM, 2505.22618), Learn2PD with end-of-text prediction
(2509.25188). Plain loops over one row; every engine path is compared with these
token for token.

Conventions: ties go to the lowest position and the lowest token id; confidences
are float32 probabilities of untempered logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from reference.llada import KVStore, TinyLLaDA

STATIC_MODES = ("low_confidence", "margin", "entropy", "left_to_right", "random")
CACHES = ("none", "prefix", "dual")


# --- What a rule sees, and the rules -------------------------------------------


@dataclass
class View:
    """The active block at one step; tensors are [B] and cover revealed positions too.

    B is smaller than the block length where EoTP has cut the canvas inside the
    block. `first` is the block's first position counted from the prompt's end,
    `forward` the index of this forward in the request, `scheduled` the number of
    commits that the static schedule has for this step (0 once it has run out).
    """

    masked: torch.Tensor
    argmax: torch.Tensor
    confidence: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor
    first: int
    forward: int
    scheduled: int

    def masked_offsets(self) -> list[int]:
        return [i for i in range(len(self.masked)) if self.masked[i]]


class Rule(NamedTuple):
    """`select` returns the block offsets to commit, a subset of the masked ones.

    `ends_by_schedule`: the block is over when its schedule is, masks left or not
    (they can be left only if the model may choose the mask id itself).
    """

    select: Callable[[View], list[int]]
    ends_by_schedule: bool = False


def _float32(value: float) -> torch.Tensor:
    # Confidences are float32, so a bound of 0.9 means float32(0.9).
    return torch.tensor(value, dtype=torch.float32)


def top_k(scores: torch.Tensor, candidates: list[int], k: int) -> list[int]:
    """The k best candidates by score, the lower offset first on a tie."""
    return sorted(candidates, key=lambda i: (-float(scores[i]), i))[:k]


def static_schedule(num_masked: int, num_steps: int) -> list[int]:
    """Commits per step: m // s, and one more in each of the first m mod s steps."""
    base, rest = divmod(num_masked, num_steps)
    return [base + (step < rest) for step in range(num_steps)]


def static(
    mode: str = "low_confidence",
    random_scores: Callable[[int, int], float] | torch.Tensor | None = None,
) -> Rule:
    """LLaDA's rule: the scheduled number of masked positions with the best score.

    `random_scores`, for mode "random": uniform numbers, either a table
    [forwards, gen_length] or a function of (forward index, position counted from
    the prompt's end).
    """
    if mode not in STATIC_MODES:
        raise ValueError(f"mode {mode!r} is not one of {STATIC_MODES}")
    if mode == "random" and random_scores is None:
        raise ValueError("mode 'random' needs random_scores")

    def select(view: View) -> list[int]:
        size = len(view.masked)
        if mode == "low_confidence":
            scores = view.confidence
        elif mode == "margin":
            scores = view.margin
        elif mode == "entropy":
            scores = -view.entropy
        elif mode == "left_to_right":
            scores = -torch.arange(size)
        elif callable(random_scores):
            scores = torch.tensor(
                [random_scores(view.forward, view.first + i) for i in range(size)]
            )
        else:
            scores = random_scores[view.forward, view.first : view.first + size]
        return top_k(scores, view.masked_offsets(), view.scheduled)

    return Rule(select, ends_by_schedule=True)


def threshold(tau: float) -> Rule:
    """Fast-dLLM: every masked position with confidence >= tau, and the best one."""

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        passes = view.confidence >= _float32(tau)
        best = top_k(view.confidence, candidates, 1)
        return sorted({i for i in candidates if passes[i]} | set(best))

    return Rule(select)


def factor(f: float) -> Rule:
    """Fast-dLLM: the n best, n maximal with (j+1)(1-c_(j)) < f for j = 2..n.

    c_(1) >= c_(2) >= ... are the masked positions' confidences; the first always
    passes. (The published loop also commits the last candidate when it alone
    fails; the definition does not.)
    """

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        order = top_k(view.confidence, candidates, len(candidates))
        n = 1
        while n < len(order):
            j = n + 1
            if not bool((j + 1) * (1 - view.confidence[order[j - 1]]) < f):
                break
            n = j
        return sorted(order[:n])

    return Rule(select)


def learn2pd(
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    tau: float = 0.96,
    k: int = 1,
) -> Rule:
    """Learn2PD: the masked positions that a tiny filter trusts, plus the k best.

    q = sigmoid(w2 relu(w1 c + b1) + b2) > tau, with c [B] the confidences of the
    whole block: those of revealed positions are the model's in its own argmax, and
    positions that EoTP cut away count as 1.0. B is the filter's width.
    """
    width = b2.shape[0]

    def select(view: View) -> list[int]:
        candidates = view.masked_offsets()
        c = torch.ones(width)
        c[: len(view.confidence)] = view.confidence
        z = w2 @ torch.relu(w1 @ c + b1) + b2
        accepted = z.sigmoid() > _float32(tau)
        forced = top_k(view.confidence, candidates, k)
        return sorted({i for i in candidates if accepted[i]} | set(forced))

    return Rule(select)


# --- The decoding loop ---------------------------------------------------------


class Statistics(NamedTuple):
    """What one forward says about its n rows; each tensor [n], float32 or int64."""

    argmax: torch.Tensor
    confidence: torch.Tensor
    margin: torch.Tensor
    entropy: torch.Tensor


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
    return Statistics(argmax, confidence, top2[:, 0] - top2[:, 1], entropy)


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
    model: TinyLLaDA,
    prompt_ids: list[int],
    *,
    gen_length: int,
    block_length: int,
    rule: Rule,
    cache: str = "none",
    steps: int | None = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    forbid_mask: bool = True,
    eos_stop: bool = True,
    eotp: str | None = None,
    eot_threshold: float = 0.9,
    observe: Callable[[View, list[int]], None] | None = None,
) -> ReferenceResult:
    """Decode one request greedily; blocks left to right from the prompt's end.

    Args:
        cache: "none" recomputes the whole row every step. "prefix" and "dual" do so
            in the first step of a block only; its later steps recompute the block
            and all right of it ("prefix") or the block alone ("dual"). Keys of rows
            not recomputed stay as they are.
        steps: total steps of the static schedule, steps // num_blocks for each
            block; default gen_length (one token a step). Other rules ignore it.
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
            "first", but the cut is at the end of the active block.
        observe: called with the view and the chosen offsets, before the commit.

    Raises:
        ValueError: an option is unknown or the lengths do not fit.
        RuntimeError: a rule other than static can make no progress
            (forbid_mask=False and the mask id is its whole choice).
    """
    if cache not in CACHES:
        raise ValueError(f"cache {cache!r} is not one of {CACHES}")
    if eotp not in (None, "first", "block", "paper"):
        raise ValueError(
            f"eotp {eotp!r} is not one of (None, 'first', 'block', 'paper')"
        )
    if gen_length % block_length:
        raise ValueError("gen_length must be a multiple of block_length")
    mask_id = model.mask_id if mask_id is None else mask_id
    eos_id = model.eos_id if eos_id is None else eos_id
    num_blocks = gen_length // block_length
    steps_per_block = (gen_length if steps is None else steps) // num_blocks
    if steps_per_block < 1:
        raise ValueError("steps must be at least the number of blocks")

    prompt_end = len(prompt_ids)
    row = list(prompt_ids) + [mask_id] * gen_length
    set_at = [-1] * len(row)
    forwards = 0

    def result(end: int) -> ReferenceResult:
        return ReferenceResult(row[prompt_end:end], forwards, set_at[prompt_end:end])

    for block in range(num_blocks):
        start = prompt_end + block * block_length
        num_masked = row[start : start + block_length].count(mask_id)
        schedule = static_schedule(num_masked, steps_per_block)
        store: KVStore | None = None
        step = 0
        while mask_id in row[start : start + block_length]:
            scheduled = schedule[step] if step < len(schedule) else 0
            if rule.ends_by_schedule and scheduled == 0:
                break
            end = min(start + block_length, len(row))

            # The forward: rows [low, high) are computed.
            low, high = 0, len(row)
            if cache != "none" and step == 0:
                store = model.new_store(len(row))
            elif cache == "prefix":
                low = start
            elif cache == "dual":
                low, high = start, end
            logits = model.forward(row[low:high], list(range(low, high)), store)
            stats = row_statistics(logits, mask_id if forbid_mask else None)

            # Masks left behind by earlier blocks widen the window to the left.
            left_over = [
                p for p in range(max(low, prompt_end), start) if row[p] == mask_id
            ]
            first = min([start, *left_over])
            view = View(
                masked=torch.tensor([row[p] == mask_id for p in range(first, end)]),
                argmax=stats.argmax[first - low : end - low],
                confidence=stats.confidence[first - low : end - low],
                margin=stats.margin[first - low : end - low],
                entropy=stats.entropy[first - low : end - low],
                first=first - prompt_end,
                forward=forwards,
                scheduled=scheduled,
            )
            chosen = rule.select(view)
            if observe is not None:
                observe(view, chosen)

            committed = []
            for offset in chosen:
                token = int(view.argmax[offset])
                if token != mask_id:
                    row[first + offset] = token
                    set_at[first + offset] = forwards
                    committed.append(first + offset)
            forwards += 1
            step += 1
            if not committed and not rule.ends_by_schedule:
                raise RuntimeError("no progress: the mask id is the only choice")

            if eotp is not None:
                revealed = [p for p in committed if row[p] == eos_id]
                predicted = {
                    p: stats.confidence[p - low]
                    for p in range(start, high)
                    if row[p] == mask_id and stats.argmax[p - low] == eos_id
                }
                cut = len(row)
                if revealed:
                    cut = min(revealed) + 1
                elif eotp == "paper" and predicted:
                    cut = max(predicted, key=lambda p: (predicted[p], -p)) + 1
                elif eotp != "paper":
                    sure = [
                        p
                        for p, c in predicted.items()
                        if p < end and c >= _float32(eot_threshold)
                    ]
                    cut = min(sure) + 1 if sure else cut
                if eotp == "block" and cut < len(row):
                    cut = end
                del row[cut:], set_at[cut:]
                if store is not None:
                    store.truncate(cut)

            if eos_stop:
                stop = _eos_end(row, prompt_end, mask_id, eos_id)
                if stop is not None:
                    return result(stop)
    return result(len(row))


def _eos_end(row: list[int], prompt_end: int, mask_id: int, eos_id: int) -> int | None:
    """One past the first generated EOS, if no mask is left of it."""
    for p in range(prompt_end, len(row)):
        if row[p] == mask_id:
            return None
        if row[p] == eos_id:
            return p + 1
    return None
