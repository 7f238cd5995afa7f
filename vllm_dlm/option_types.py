# SPDX-License-Identifier: Apache-2.0
"""Types of options, stricter than pydantic's: numbers, lengths, objects as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_dlm.messages import quote, unknown
from vllm_dlm.option_bounds import check_size


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not a boolean")
    return value


Count = Annotated[int, BeforeValidator(_refuse_bool)]
Number = Annotated[float, BeforeValidator(_refuse_bool)]

WHOLE_CANVAS = "canvas"
"""The block length that makes the whole canvas, as wide as `max_tokens`, one block."""


def read_json(value: Any) -> Any:
    """Parse an option that came as JSON text; any other value is returned as it is.

    Raises:
        ValueError: the text is no JSON, nested deeper than Python reads, or too long.
    """
    if not isinstance(value, str):
        return value
    check_size("the JSON text", value)
    try:
        read = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from None
    check_size("the JSON text", read)
    return read


def _check_block_length(value: Any) -> Any:
    if value == WHOLE_CANVAS:
        return value
    try:
        number = 0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if 1 <= number <= 1024 and number == int(number):
        return int(number)
    raise ValueError(
        f"expected an integer from 1 to 1024 or {WHOLE_CANVAS!r}, got {quote(value)}"
    )


MOST_OF_TEXT = 4096
"""Most characters or token ids of a text of `tccf`; `tccf.py` bounds its tokens."""

TokenIds = Annotated[
    list[Count], Field(min_length=1, max_length=MOST_OF_TEXT, fail_fast=True)
]
Text = Annotated[str, Field(min_length=1, max_length=MOST_OF_TEXT)] | TokenIds
BlockLength = Annotated[int | Literal["canvas"], BeforeValidator(_check_block_length)]


def _read_stages(value: Any) -> Any:
    value = read_json(value)
    if isinstance(value, Mapping):
        for name in value:
            if name not in ThinkCoarse.model_fields:
                raise ValueError(unknown(name, ThinkCoarse.model_fields))
    return value


class ThinkCoarse(BaseModel):
    """The option `tccf`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trigger: Text = Field(
        description="Text, or token ids, that ends the first stage (`</think>`)."
    )
    check: Text = Field(
        description="Text, or token ids, that is put behind the first stage for the "
        "model to go on."
    )
    keep_trigger: bool = Field(
        default=False, description="Whether the trigger stays in front of the check."
    )
    always: bool = Field(
        default=True,
        description="Whether the second stage follows where the first one ends without "
        "the trigger, too: with the text, or with its tokens.",
    )
    critic_tokens: Count | None = Field(
        default=None,
        ge=0,
        description="Most tokens of the second stage, which the first one leaves of "
        "max_tokens; 0 is what is left of them. Default: 4096, at most half.",
    )


Stages = Annotated[ThinkCoarse | None, BeforeValidator(_read_stages)]
Object = Annotated[dict[str, Any], BeforeValidator(read_json)]
"""Parameters, as a dict or as JSON text; the strategy or cache policy that they are for
checks them."""
