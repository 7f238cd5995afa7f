# SPDX-License-Identifier: Apache-2.0
"""Window-Diffusion's decoding loop (arXiv 2601.20332), greedy, one request.

As the authors' code decodes Dream, and the same for models without a shift. There are
no blocks. Conventions are those of `reference.procedures`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reference.cached_procedures import leading
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from reference.procedures import ReferenceResult, row_statistics


@dataclass
class WindowResult(ReferenceResult):
    """`rows[i]`: first and one past the last row that forward i computed."""

    rows: list[tuple[int, int]] = field(default_factory=list)


def generate_windows(
    model: TinyModel | TinyLLaDA,
    prompt_ids: list[int],
    *,
    gen_length: int,
    external: int,
    active: int,
    refresh_every: int,
    early_stop: bool,
    shift: int,
    ends: bool = True,
    counts_mask: bool = False,
) -> WindowResult:
    """Decode one request, one token a step.

    Step i is a **refresh** if i is a multiple of `refresh_every`, or if the text was
    cut before it. A refresh runs over the prompt and the canvas up to its mask of
    number `external`, counted from the left; what lies behind that is not there for any
    step until the next refresh. Its first mask is noted: every step that is no refresh
    runs over the positions from there to the mask of number `active` now, whose keys
    and values replace those of before.

    A refresh of a model with a shift writes the first mask, from the row to its left,
    which no other step computes. All other steps write the one of the first `active`
    masks that is least uncertain.

    With `early_stop` the canvas ends with a token written that ends the text, and all
    further steps are refreshes.

    The authors' code counts one mask less than its `o_win_size`, takes any EOS for the
    end, the prompt's too, and fails where the active window leaves the external one;
    here what is computed is seen.

    Args:
        ends: the model's EOS ends the text, and the request; else it is a token as any.
        counts_mask: the mask id, which is never predicted, has its share of the
            distribution that is uncertain.
    """
    mask_id, eos_id = model.mask_id, model.eos_id
    begin = len(prompt_ids)
    row = list(prompt_ids) + [mask_id] * gen_length
    set_at = [-1] * len(row)
    rows: list[tuple[int, int]] = []
    first, seen, is_cut = 0, 0, False
    store = model.new_store(len(row))
    while masks := [p for p in range(begin, len(row)) if row[p] == mask_id]:
        refresh = is_cut or len(rows) % refresh_every == 0
        candidates = masks[:active]
        if refresh:
            first = masks[0]
            seen = masks[external - 1] + 1 if external <= len(masks) else len(row)
            span = (0, seen)
        else:
            span = (first, candidates[-1] + 1)
            seen = max(seen, span[1])
        rows.append(span)
        logits = model.forward(
            row[span[0] : span[1]], list(range(*span)), leading(store, seen)
        )
        sources = [max(p - shift - span[0], 0) for p in candidates]
        stats = row_statistics(logits[sources], mask_id)
        banned = None if counts_mask else mask_id
        entropy = row_statistics(logits[sources], banned).entropy
        best = 0 if refresh and shift else int(entropy.argmin())
        place = candidates[best]
        row[place] = int(stats.argmax[best])
        set_at[place] = len(rows) - 1
        if ends and early_stop and row[place] == eos_id:
            del row[place + 1 :], set_at[place + 1 :]
            is_cut = True
            store.truncate(len(row))
        texts = [p for p in range(begin, len(row)) if row[p] in (mask_id, eos_id)]
        if ends and texts and row[texts[0]] == eos_id:
            # The engine ends a request once its text has ended.
            del row[texts[0] + 1 :], set_at[texts[0] + 1 :]
            break
    return WindowResult(row[begin:], len(rows), set_at[begin:], rows)
