# SPDX-License-Identifier: Apache-2.0
"""LLaDA2.1's decoding loop (arXiv 2602.08676), whole: blocks filled, edited, closed.

Written from the description of its published code, without the machinery of `rules`
and `block_procedures`, which it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference.network import TinyModel, block_causal
from reference.procedures import row_statistics


class NeverEnds(RuntimeError):
    """The published loop would go on for ever: a forward changed nothing."""


def generate_llada21(
    model: TinyModel,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    block_length: int,
    mask_threshold: float,
    edit_threshold: float,
    max_post_steps: int,
    stops: bool = True,
    observe: Callable[[float], None] | None = None,
) -> tuple[list[int], list[int]]:
    """Decode one request greedily; the mask id may be chosen.

    Blocks are counted from position 0; the prompt's last tokens share the first one and
    never change. A step of a block sees it and all that is left of it, and takes for
    each position the most probable token x with its probability c:

    - masks with c > mask_threshold become x; if there is none, the one with the largest
      c does. A mask that becomes the mask id is still one.
    - tokens of the output with c > edit_threshold become x. This x may be the mask id:
      then the position is masked again.

    Before each forward it is seen whether the block has a mask. Forwards without count:
    after `max_post_steps` the block is over. It is, too, after a forward without masks
    that changed nothing.

    Args:
        stops: the text ends with its first end-of-text token, when that block is over.
        observe: called after each forward with about the least change of a probability
            that would have led to another decision.

    Returns:
        The tokens, at most `max_tokens`, and the forwards of each block.
    """
    row = list(prompt_ids)
    start = len(row) // block_length * block_length
    forwards: list[int] = []
    while len(row) < len(prompt_ids) + max_tokens:
        row += [model.mask_id] * (start + block_length - len(row))
        post_steps = 0
        forwards.append(0)
        while True:
            masks = [p for p in range(start, len(row)) if row[p] == model.mask_id]
            masks = [p for p in masks if p >= len(prompt_ids)]
            if not masks:
                post_steps += 1
                if post_steps > max_post_steps:
                    break
            visible = block_causal(len(row), block_length)
            logits = model.forward(row, visible=visible)[start:]
            found = row_statistics(logits, None)
            forwards[-1] += 1
            token = dict(enumerate(found.argmax.tolist(), start))
            sure = dict(enumerate(found.confidence, start))

            filled = [p for p in masks if sure[p] > torch.tensor(mask_threshold)]
            if masks and not filled:
                filled = [max(masks, key=lambda p: (float(sure[p]), -p))]
            edited = [
                p
                for p in range(max(start, len(prompt_ids)), len(row))
                if p not in masks
                and token[p] != row[p]
                and sure[p] > torch.tensor(edit_threshold)
            ]
            if observe is not None:
                margin = dict(enumerate(found.margin.tolist(), start))
                best = sorted(float(sure[p]) for p in masks)[-2:]
                gaps = [best[1] - best[0]] if len(best) == 2 else []
                for p in range(max(start, len(prompt_ids)), len(row)):
                    bound = mask_threshold if p in masks else edit_threshold
                    gaps.append(abs(float(sure[p]) - bound))
                    if p in filled or (p not in masks and sure[p] > bound):
                        gaps.append(margin[p])
                observe(min(gaps))
            before = list(row)
            for p in [*filled, *edited]:
                row[p] = token[p]
            if not masks and not edited:
                break
            if row == before or forwards[-1] > 100 * block_length:
                raise NeverEnds
        output = row[len(prompt_ids) :]
        start += block_length
        if stops and model.eos_id in output:
            return output[: output.index(model.eos_id) + 1][:max_tokens], forwards
    return row[len(prompt_ids) :][:max_tokens], forwards
