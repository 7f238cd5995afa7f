# SPDX-License-Identifier: Apache-2.0
"""FreeDave over whole requests in plain loops: what it writes, and in which forwards.

Draft, verify and go on, as arXiv 2510.00294 and cychomatica/FreeDave do it, greedy, one
token a step. A canvas is a row of ids; what another forward would make of it is found
by that forward, one canvas at a time. Conventions are those of `reference.procedures`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

from reference.cached_procedures import leading, step_span
from reference.network import TinyModel, block_causal
from reference.procedures import ReferenceResult, row_statistics

Predicted = dict[int, tuple[int, float]]
"""Masked position -> its most probable token, and the probability."""
Order = Callable[[Predicted], list[int]]
"""The masked positions in the order in which one step after the other writes them."""


def by_confidence(predicted: Predicted) -> list[int]:
    """The most confident first; of equal ones the lowest."""
    return sorted(predicted, key=lambda p: (-predicted[p][1], p))


def follow(
    canvases: list[list[int]], evaluate: Callable[[int], Predicted], order: Order
) -> tuple[list[int], list[int], int]:
    """Go from canvas to canvas for as long as the next one is what a step makes.

    Args:
        canvases: canvas j has the first j drafts.
        evaluate: what a forward predicts on canvas j.

    Returns:
        The canvas after the last step; all that is drafted next, by rank; how many
        steps these were.
    """
    reached = 0
    while True:
        predicted = evaluate(reached)
        first, *rest = order(predicted)
        after = list(canvases[reached])
        after[first] = predicted[first][0]
        if canvases[reached + 1 : reached + 2] != [after]:
            return after, rest, reached + 1
        reached += 1


def drafted(
    row: list[int], drafts: list[tuple[int, int]], count: int
) -> list[list[int]]:
    """`count` canvases: the row, and with one draft more each."""
    canvases = [list(row)]
    for position, token in drafts[: count - 1]:
        canvases.append(list(canvases[-1]))
        canvases[-1][position] = token
    return canvases


def freedave(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    gen_length: int,
    block_length: int,
    drafts: int,
    cache: str = "none",
    shift: int = 0,
    room: Callable[[int, int, int], int] = lambda start, end, length: 16,
) -> ReferenceResult:
    """Decode one request by full attention under a KV policy.

    Args:
        gen_length: whole blocks.
        drafts: canvases of a forward, at most.
        cache: "none", "prefix" or "dual"; see `cached_procedures.step_span`.
        shift: the logits for position p are those of row p - shift.
        room: canvases that a forward has room for, by the rows [start, end) of each
            and the length of prompt and canvas.
    """
    mask_id = model.mask_id
    row = list(prompt_ids) + [mask_id] * gen_length
    set_at = [-1] * len(row)
    forwards = 0
    for start in range(len(prompt_ids), len(row), block_length):
        end = start + block_length
        store = None if cache == "none" else model.new_store(len(row))
        planned: list[tuple[int, int]] = []
        while mask_id in row[start:end]:
            is_refresh = row[start:end].count(mask_id) == block_length
            span = step_span(
                cache,
                {},
                step=0 if is_refresh else 1,
                is_first_block=start == len(prompt_ids),
                start=start,
                end=end,
                length=len(row),
                masks=[p for p in range(start, len(row)) if row[p] == mask_id],
                phase=start,
                computed=0 if is_refresh else len(row),
                always=False,
                whole_block=False,
                shift=shift,
            )

            def evaluate(
                canvas: list[int], on: object, span=span, start=start, end=end
            ) -> Predicted:
                computed = range(span.first_row, span.end_row)
                ids = [canvas[p] for p in computed]
                logits = model.forward(ids, list(computed), leading(on, span.seen))
                masks = [p for p in range(start, end) if canvas[p] == mask_id]
                sources = [max(p - shift, 0) - span.first_row for p in masks]
                stats = row_statistics(logits[sources], mask_id)
                tokens, sure = stats.argmax.tolist(), stats.confidence.tolist()
                return dict(zip(masks, zip(tokens, sure, strict=True), strict=True))

            most = min(
                drafts,
                # A canvas without masks predicts nothing.
                row[start:end].count(mask_id),
                room(span.first_row, span.end_row, len(row)),
            )
            canvases = drafted(row, planned, most)
            found: dict[int, Predicted] = {}

            def on_canvas(
                j: int, canvases=canvases, store=store, found=found, evaluate=evaluate
            ) -> Predicted:
                # Only what the first canvas computes stays.
                found[j] = evaluate(canvases[j], store if j == 0 else deepcopy(store))
                return found[j]

            after, rest, steps = follow(canvases, on_canvas, by_confidence)
            planned = [(p, found[steps - 1][p][0]) for p in rest]
            for p in range(start, end):
                if after[p] != row[p]:
                    set_at[p] = forwards
            row = after
            forwards += 1
    first = len(prompt_ids)
    return ReferenceResult(row[first:], forwards, set_at[first:])


def freedave_blocks(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    drafts: int,
    eager: bool,
    origin: str = "start",
    max_model_len: int,
    eos_ids: frozenset[int] = frozenset(),
    room: Callable[[int, int, int], int] = lambda start, end, length: 16,
) -> ReferenceResult:
    """Decode one request block after block; `forwards` are those up to its last token.

    Args:
        eager: draft the blocks to come too, as many as the drafts may reach, and go on
            in them where the active block is full.
        origin: as of `generate_blocks`.
        max_model_len: no position from here on exists.
        eos_ids: end the text.
        room: as of `freedave`; rows begin with what is not final yet.
    """
    mask_id, prompt_end = model.mask_id, len(prompt_ids)
    border = prompt_end % block_length if origin == "prompt" else 0
    blocks = -(-(prompt_end + max_tokens - border) // block_length)
    limit = min(border + blocks * block_length, max_model_len)
    row = list(prompt_ids) + [mask_id] * (limit - prompt_end)
    set_at = [-1] * limit
    forwards, computed = 0, 0
    planned: list[tuple[int, int]] = []

    def block_of(position: int) -> int:
        return (position - border) // block_length

    def result() -> ReferenceResult | None:
        for p in range(prompt_end, min(prompt_end + max_tokens, limit)):
            if row[p] == mask_id:
                return None
            if row[p] in eos_ids:
                break
        return ReferenceResult(
            row[prompt_end : p + 1], forwards, set_at[prompt_end : p + 1]
        )

    while (done := result()) is None:
        first = border + block_of(row.index(mask_id, prompt_end)) * block_length
        ahead = -(-drafts // block_length) if eager else 0
        stop = min(first + (1 + ahead) * block_length, limit)

        def evaluate(canvas: list[int], stop: int = stop) -> Predicted:
            visible = block_causal(stop, block_length, border)
            logits = model.forward(canvas[:stop], visible=visible)
            masks = [p for p in range(prompt_end, stop) if canvas[p] == mask_id]
            stats = row_statistics(logits[masks], mask_id)
            tokens, sure = stats.argmax.tolist(), stats.confidence.tolist()
            return dict(zip(masks, zip(tokens, sure, strict=True), strict=True))

        def by_block(predicted: Predicted) -> list[int]:
            return sorted(by_confidence(predicted), key=block_of)

        missing = row[prompt_end:stop].count(mask_id)
        most = min(drafts, missing, room(computed, stop, stop))
        canvases = drafted(row, planned, most)
        found: dict[int, Predicted] = {}

        def on_canvas(
            j: int, canvases=canvases, found=found, evaluate=evaluate
        ) -> Predicted:
            found[j] = evaluate(canvases[j])
            return found[j]

        after, rest, steps = follow(canvases, on_canvas, by_block)
        planned = [(p, found[steps - 1][p][0]) for p in rest]
        for p in range(prompt_end, stop):
            if after[p] != row[p]:
                set_at[p] = forwards
        if not eager and mask_id not in after[first:stop]:
            planned = []
        row = after
        forwards += 1
        computed = first
    return done
