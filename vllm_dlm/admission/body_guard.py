# SPDX-License-Identifier: Apache-2.0
"""Refuses bodies that vLLM's protocol classes cannot take, before these see them.

They validate every entry of a list, by each type it may have, and report each that is
none: a million bad entries take a minute, in which the server answers nobody. Here the
entries of large bodies are looked at one by one, up to the first wrong one. And they
read into `structured_outputs` before they know that it is an object, a 500 where it is
none.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_dlm.messages import OptionError, bounded, name_of, quote

LARGE = 1 << 16
"""Bytes from which lists are looked at: smaller bodies hold no long ones."""

MOST_OPTIONS = 256
"""Most keys of `vllm_xargs`: far more than there are options."""

MOST_IDS = 1 << 18
"""Most entries of a sampling parameter: no vocabulary is larger."""

_READ_INTO = "structured_outputs"
"""See docs/upstream.md#structured_outputs-that-is-no-object-is-a-500."""

process = {"ours": False}
"""Whether this process is the front end of one of our models: neither the middleware
nor `get_max_tokens` is told which model it works for."""

MIDDLEWARE = f"{__name__}.BodyGuard"


class BodyGuard:
    """ASGI middleware, for `--middleware`.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on as it came, or answer 400."""
        if not process["ours"] or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        came: deque[Message] = deque()
        while not came or came[-1].get("more_body", False):
            came.append(await receive())
        try:
            check_body(b"".join(message.get("body", b"") for message in came))
        except OptionError as error:
            await _answer(scope["path"], error)(scope, receive, send)
            return

        async def again() -> Message:
            return came.popleft() if came else await receive()

        await self._app(scope, again, send)


def _has_body(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] == "POST"


def _answer(path: str, error: OptionError) -> JSONResponse:
    """The answer, as vLLM words errors on this route."""
    told: dict[str, Any] = {
        "message": bounded(str(error)),
        "type": "BadRequestError",
    }
    if path.endswith("/v1/messages"):
        return JSONResponse({"type": "error", "error": told}, status_code=400)
    told |= {"param": error.field and bounded(error.field), "code": 400}
    return JSONResponse({"error": told}, status_code=400)


def check_body(text: bytes) -> None:
    """Check the fields of a body that may be long, and `structured_outputs`.

    Raises:
        OptionError: a field holds an entry of a wrong type; it names the first.
    """
    is_large = len(text) >= LARGE
    if not is_large and _READ_INTO.encode() not in text:
        return
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return  # vLLM says what is wrong with it.
    if not isinstance(body, dict):
        return
    constraint = body.get(_READ_INTO)
    if constraint is not None and not isinstance(constraint, dict):
        raise OptionError(
            f"{_READ_INTO}: expected an object, got {quote(constraint)}", _READ_INTO
        )
    if not is_large:
        return
    _check_fields(body, "")
    inner = body.get("sampling_params")
    if isinstance(inner, dict):
        _check_fields(inner, "sampling_params.")


def _check_fields(fields: Mapping[str, Any], path: str) -> None:
    for name, (check, expected) in _LONG.items():
        value = fields.get(name)
        if isinstance(value, list):
            if name != "token_ids":
                _check_length(path + name, len(value))
            _check_entries(path + name, value, check, expected)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt:
        _check_prompt(path + "prompt", prompt)
    bias = fields.get("logit_bias")
    if isinstance(bias, dict):
        _check_length(path + "logit_bias", len(bias))
        _check_entries(path + "logit_bias", bias, _is_text_id, "token ids as names")
        _check_entries(path + "logit_bias", bias.values(), _is_number, "numbers")
    options = fields.get("vllm_xargs")
    if isinstance(options, dict):
        _check_options(path + "vllm_xargs", options)


def _check_length(path: str, length: int) -> None:
    if length > MOST_IDS:
        raise OptionError(
            f"{path} has {length} entries; at most {MOST_IDS} are taken", path
        )


def _check_options(path: str, options: Mapping[str, Any]) -> None:
    if len(options) > MOST_OPTIONS:
        raise OptionError(
            f"{path} has {len(options)} keys; at most {MOST_OPTIONS} are read", path
        )
    for key, value in options.items():
        if isinstance(value, list):
            name = f"{path}.{name_of(key)}"
            _check_entries(name, value, _is_plain, "texts and numbers")


def _check_prompt(path: str, prompt: list[Any]) -> None:
    if isinstance(prompt[0], list):
        _check_entries(path, prompt, _is_list, "lists of token ids")
        for ids in prompt:
            _check_entries(path, ids, _is_id, "token ids")
    elif isinstance(prompt[0], str):
        _check_entries(path, prompt, _is_text, "texts")
    else:
        _check_entries(path, prompt, _is_id, "token ids")


def _check_entries(
    path: str, entries: Iterable[Any], check: Callable[[Any], bool], expected: str
) -> None:
    for number, entry in enumerate(entries):
        if not check(entry):
            raise OptionError(
                f"{path}: expected {expected}, and entry {number} is {quote(entry)}",
                path,
            )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_text_id(value: str) -> bool:
    return len(value) < 20 and value.removeprefix("-").isdecimal()


_LONG: dict[str, tuple[Callable[[Any], bool], str]] = {
    "token_ids": (_is_id, "token ids"),
    "stop_token_ids": (_is_integer, "token ids"),
    "allowed_token_ids": (_is_integer, "token ids"),
    "logprob_token_ids": (_is_integer, "token ids"),
    "stop": (_is_text, "texts"),
    "stop_sequences": (_is_text, "texts"),
    "bad_words": (_is_text, "texts"),
}
"""Field -> the test that every entry of a list must pass, and its name in a message."""
