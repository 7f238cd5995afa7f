# SPDX-License-Identifier: Apache-2.0
"""Answers that take a while, asked for in whole and in a stream, for what happens
meanwhile."""

from __future__ import annotations

from typing import Any

import httpx
import openai
from server.launch import Server

LONG: dict[str, Any] = {
    # A token a step: it takes a while.
    "prompt": "Copy [Ada, Ben]",
    "max_tokens": 128,
    "ignore_eos": True,
    "vllm_xargs": {"dlm_strategy": "static", "dlm_block_length": 8},
}


class Aborted(Exception):
    """An answer that says that it is a part: `finish_reason` "abort"."""


ERRORS = (openai.APIError, httpx.TransportError, Aborted)


def whole(server: Server) -> str:
    """The text, in one answer.

    Raises:
        one of `ERRORS`: there is none.
    """
    choice = server.complete(**LONG).choices[0]
    return _complete(choice.text, choice.finish_reason)


def streamed(server: Server) -> str:
    """The text, put together from events; raises what `whole` does."""
    text, reason = "", None
    for event in server.complete(stream=True, **LONG):
        text += event.choices[0].text
        reason = event.choices[0].finish_reason or reason
    return _complete(text, reason)


def _complete(text: str, reason: str | None) -> str:
    if reason is None:
        raise httpx.RemoteProtocolError("the stream ended too early")
    if reason == "abort":
        raise Aborted
    assert reason == "length", reason
    return text
