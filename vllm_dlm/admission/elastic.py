# SPDX-License-Identifier: Apache-2.0
"""Canvases with an elastic hole: what else the request may ask for.

What its options may be is `config/elastic.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_dlm.admission.client_fields import field_of
from vllm_dlm.messages import OptionError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.config.canvas import Canvas
    from vllm_dlm.config.model import ModelDefaults

_MOVES = "tokens of an elastic hole have no place of their own until it is filled"

REFUSED = {
    "min_tokens": "an elastic hole may end with no token at all",
    "stop": "an elastic hole ends when it has no mask left",
    "logprobs": _MOVES,
    "bad_words": "two tokens become neighbours when one between them goes",
    "repetition_detection": "an elastic hole ends when it has no mask left",
}
"""Sampling parameters that are refused beside an elastic hole, and why."""


def made_elastic(
    canvas: Canvas,
    initial: int,
    ends: frozenset[int],
    params: SamplingParams,
    model: ModelDefaults,
    names: Mapping[str, str],
) -> Canvas:
    """The canvas, whose one hole begins with `initial` masks, or all that it has.

    Args:
        ends: tokens that end a text, or pad one: they take positions away.
        params: the request's.
        names: option -> the name that it was set under.

    Raises:
        OptionError: there are several holes, or the request asks for what only holes
            of fixed lengths can do.
    """
    holes = names["holes"]
    if len(canvas.holes) != 1:
        raise OptionError(
            f"{holes} 'elastic' is for one hole, and the canvas has "
            f"{len(canvas.holes)}: send the text with one hole at a time, or use "
            "'exact' or 'shrink'",
            holes,
        )
    if not ends:
        raise OptionError(
            f"{holes} 'elastic': neither model nor tokenizer declare an end of "
            "text, which is what makes a hole narrower; use 'exact'",
            holes,
        )
    for name, why in REFUSED.items():
        # `logprobs` of 0 asks for those of the tokens themselves.
        value = getattr(params, name)
        if value or (name == "logprobs" and value is not None):
            field = field_of(name)
            raise OptionError(
                f"{field} cannot be combined with {holes} 'elastic': {why}; leave "
                "it out, or use 'exact'",
                name,
            )
    allowed = {*(params.allowed_token_ids or ())}
    left = allowed - {*model.no_text}
    if allowed and not left:
        raise OptionError(
            f"{field_of('allowed_token_ids')} holds only tokens that are no text, "
            "and a hole is not filled by them; add a token",
            "allowed_token_ids",
        )
    return replace(canvas, initial=min(initial, canvas.holes[0][1]))
