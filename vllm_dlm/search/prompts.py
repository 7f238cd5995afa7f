# SPDX-License-Identifier: Apache-2.0
"""What may be searched for, and what may not be set beside a driver."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm_dlm.messages import quote
from vllm_dlm.search.base import Token

FORMS = ("prompt", "prompt_token_ids", "messages", "question", "text")
"""Keys of a prompt given as a dict; all others go to the candidates' `record`."""

THE_DRIVERS = ("n", "max_tokens", "temperature", "seed", "logprobs", "output_kind")
"""Sampling parameters that the driver sets."""


def refuse_the_drivers(given: Iterable[str]) -> None:
    """Refuse what the driver sets in every request.

    Raises:
        ValueError: the first of them.
    """
    for name in given:
        if name in THE_DRIVERS:
            raise ValueError(
                f"sampling: {name} is for the search to set, which has options of its "
                "own for it; leave it out"
            )


def read_prompt(prompt: Any) -> tuple[Any, Mapping[str, Any]]:
    """A prompt, and what else came with it.

    Raises:
        ValueError: a dict without a prompt, or with several.
    """
    if not isinstance(prompt, Mapping):
        return prompt, {}
    found = [form for form in FORMS if form in prompt]
    if not found:
        raise ValueError(
            f"{quote(prompt)} holds no prompt: expected one of {', '.join(FORMS)}"
        )
    # A record may hold several texts; the first form is the prompt.
    form = found[0]
    return prompt[form], {key: value for key, value in prompt.items() if key != form}


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def token_ids(prompt: Any) -> tuple[Token, ...]:
    """A prompt that is token ids already.

    Raises:
        ValueError: it is something else.
    """
    is_list = isinstance(prompt, list | tuple)
    if not is_list or not all(type(token) is int and token >= 0 for token in prompt):
        raise ValueError(
            f"{quote(prompt)} is no prompt: expected a text, a list of token ids, or a "
            "list of messages with `role` and `content`"
        )
    return tuple(prompt)
