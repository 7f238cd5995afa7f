# SPDX-License-Identifier: Apache-2.0
"""Which field of a client's request became which sampling parameter.

vLLM's routes give sampling parameters other names, and make one of several fields:
`max_output_tokens`, `response_format`, `output_config`. A refusal names the field that
was sent. The wrapped handlers (`patches/handlers.py`) note which route a request came
by; code that runs on behalf of the request asks here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Route:
    """How one kind of request is written."""

    options: str
    """The field from which `SamplingParams.extra_args` is made."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sampling parameter -> the fields it may come from; the first that is set wins."""
    prefix: str = ""
    """What stands before the names of all other parameters."""
    holds: frozenset[str] = frozenset()
    """What its answers have a place for: "step_map", "canvas_fields"."""


EVERYTHING = frozenset({"step_map", "canvas_fields"})

OFFLINE = Route("extra_args", holds=EVERYTHING)
COMPLETION = Route(
    "vllm_xargs",
    {
        "structured_outputs": ("structured_outputs", "response_format"),
        "prompt_logprobs": ("prompt_logprobs", "echo"),
    },
    holds=EVERYTHING,
)
CHAT = Route(
    "vllm_xargs",
    {
        "prompt": ("messages",),
        "structured_outputs": (
            *("structured_outputs", "response_format", "tool_choice", "tools"),
        ),
        "max_tokens": ("max_completion_tokens", "max_tokens"),
        "logprobs": ("top_logprobs", "logprobs"),
        "prompt_logprobs": ("prompt_logprobs", "echo"),
    },
    holds=EVERYTHING,
)
BATCH = replace(CHAT, holds=frozenset())
RESPONSES = Route(
    "vllm_xargs",
    {
        "prompt": ("input",),
        "structured_outputs": (
            *("structured_outputs", "text.format", "tool_choice", "tools"),
        ),
        "max_tokens": ("max_output_tokens",),
        "logprobs": ("top_logprobs",),
    },
)
MESSAGES = Route(
    "vllm_xargs",
    {
        "prompt": ("messages",),
        "structured_outputs": ("output_config.format", "tool_choice", "tools"),
        "stop": ("stop_sequences",),
        "thinking_token_budget": ("thinking.budget_tokens",),
    },
)
GENERATE = Route(
    "sampling_params.extra_args",
    {"prompt": ("token_ids",), "stream": ("stream",)},
    prefix="sampling_params.",
    holds=frozenset({"step_map"}),
)

HARMLESS = {
    "response_format": "text",
    "text.format": "text",
    "tool_choice": ("none", "auto", None),
}
"""Field -> the values, or their `type`, with which it asks for no grammar."""


@dataclass(frozen=True)
class _Sent:
    route: Route = OFFLINE
    fields: Mapping[str, str] = field(default_factory=dict)
    has_length: bool | None = None
    """Whether the client has set `max_tokens`; None where that cannot be told."""


_sent: ContextVar[_Sent] = ContextVar("vllm_dlm_sent", default=_Sent())  # noqa: B039


@contextmanager
def sent_by(route: Route, request: Any) -> Iterator[bool]:
    """Note where a request's sampling parameters come from, while it is handled.

    A route may hand its request on to the handler of another route: the first one knows
    what the client sent.

    Args:
        route: of the handler.
        request: the body, as vLLM's protocol class.

    Yields:
        Whether this is the first handler of the request.
    """
    if _sent.get().route is not OFFLINE:
        yield False
        return
    # Not later: parsers of tools write into the request.
    fields = {
        name: next((each for each in sources if _is_set(request, each)), sources[0])
        for name, sources in route.names.items()
    }
    has_length = None
    if route is not GENERATE:
        sources = route.names.get("max_tokens", ("max_tokens",))
        given = getattr(request, "model_fields_set", ())
        has_length = any(each in given and _is_set(request, each) for each in sources)
        length = getattr(request, "max_tokens", None)
        if route is COMPLETION and length == DEFAULT_LENGTH:
            # vLLM writes its default into the body of who does not set it.
            has_length = None
    token = _sent.set(_Sent(route, fields, has_length))
    try:
        yield True
    finally:
        _sent.reset(token)


def field_of(parameter: str) -> str:
    """What the client calls a sampling parameter (or `prompt`)."""
    sent = _sent.get()
    return sent.fields.get(parameter) or sent.route.prefix + parameter


def has_place_for(what: str) -> bool:
    """Whether the answer of the route that is served can hold something.

    Args:
        what: see `Route.holds`.
    """
    return what in _sent.get().route.holds


DEFAULT_LENGTH = 16
"""vLLM's `SamplingParams.max_tokens` of who does not set it."""


def gave_length(params: SamplingParams) -> bool:
    """Whether a client has set `max_tokens`.

    Offline, on a route that takes sampling parameters as they are, and in completions,
    vLLM's default is taken for not set: nothing tells it from a client's own.
    """
    has_length = _sent.get().has_length
    if has_length is None:
        return params.max_tokens not in (None, DEFAULT_LENGTH)
    return has_length


def in_the_clients_words(text: str) -> str:
    """A message of vLLM's about sampling parameters, with the names that were sent."""
    for name, sent in _sent.get().fields.items():
        if sent != name and name != "prompt":
            text = re.sub(rf"(?<![\w.]){name}(?!\w)", sent, text)
    return text


def options_field() -> str:
    """What the client calls `extra_args`."""
    return _sent.get().route.options


def _is_set(request: Any, path: str) -> bool:
    value, *names = request, *path.split(".")
    for name in names:
        # Not by `getattr`: deprecated fields would warn.
        value = getattr(value, "__dict__", {}).get(name)
    if value is None or value is False or value == []:
        return False
    harmless = HARMLESS.get(path, ())
    kind = value if isinstance(value, str) else _type_of(value)
    return kind not in ((harmless,) if isinstance(harmless, str) else harmless)


def _type_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        return value.get("type")
    return getattr(value, "type", "")
