# SPDX-License-Identifier: Apache-2.0
"""The HTTP server's handlers get subclasses of ours when they are made.

vLLM makes a handler for each kind of request and offers no hook; but all share one base
class, whose constructor is wrapped. What the subclasses do otherwise is in
`unread_fields.py` and `admission.py` (refusals), and `replies.py` (answers).

An ASGI middleware could not take their place: what the client sent is known in full
only after vLLM has parsed the body (its own errors come first), `vllm run-batch` and
other routes call the handlers without any middleware, and step maps are read off an
engine's outputs, which no answer holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.client_fields import (
    BATCH,
    CHAT,
    COMPLETION,
    GENERATE,
    MESSAGES,
    RESPONSES,
    Route,
)
from vllm_dlm.patches.admission import checked_before_the_stream
from vllm_dlm.patches.ledger import Make, Where, patch
from vllm_dlm.patches.replies import (
    chat_response,
    chat_stream,
    completion_response,
    completion_stream,
    raise_if_error,
)
from vllm_dlm.patches.unread_fields import handle
from vllm_dlm.vllm_objects import missing

if TYPE_CHECKING:
    from vllm.entrypoints.serve.engine.serving import BaseServing

_ENTRYPOINTS = "vllm.entrypoints"
_COMPLETION = f"{_ENTRYPOINTS}.openai.completion.serving:OpenAIServingCompletion"
_CHAT = f"{_ENTRYPOINTS}.openai.chat_completion.serving:OpenAIServingChat"
_BATCH = f"{_ENTRYPOINTS}.openai.chat_completion.batch_serving:OpenAIServingChatBatch"
_RESPONSES = f"{_ENTRYPOINTS}.openai.responses.serving:OpenAIServingResponses"
_MESSAGES = f"{_ENTRYPOINTS}.anthropic.serving:AnthropicServingMessages"
_TOKENS = f"{_ENTRYPOINTS}.scale_out.token_in_token_out.serving:ServingTokens"
_RENDER = f"{_ENTRYPOINTS}.scale_out.render.serving:ServingRender"
_GENERATE = f"{_ENTRYPOINTS}.generate.base.serving:GenerateBaseServing"

HANDLERS: dict[str, Route] = {
    f"{_COMPLETION}.create_completion": COMPLETION,
    f"{_CHAT}.create_chat_completion": CHAT,
    f"{_BATCH}.create_batch_chat_completion": BATCH,
    f"{_RESPONSES}.create_responses": RESPONSES,
    f"{_MESSAGES}.create_messages": MESSAGES,
    f"{_TOKENS}.serve_tokens": GENERATE,
    f"{_RENDER}.render_completion_request": COMPLETION,
    f"{_RENDER}.render_chat_request": CHAT,
    f"{_RENDER}.render_responses_request": RESPONSES,
    f"{_RENDER}.render_messages_request": MESSAGES,
}
"""Method of the HTTP server -> the route whose requests it handles."""

WITH_FRAMES = (f"{_COMPLETION}.create_completion", f"{_CHAT}.create_chat_completion")
"""Those whose streams have frames."""

METHODS: dict[str, Make] = {
    **{
        symbol: handle(route, has_frames=symbol in WITH_FRAMES)
        for symbol, route in HANDLERS.items()
    },
    f"{_RESPONSES}._generate_with_builtin_tools": checked_before_the_stream,
    f"{_GENERATE}._raise_if_error": raise_if_error,
    f"{_COMPLETION}.request_output_to_completion_response": completion_response,
    f"{_CHAT}.chat_completion_full_generator": chat_response,
    f"{_COMPLETION}.completion_stream_generator": completion_stream,
    f"{_CHAT}.chat_completion_stream_generator": chat_stream,
}
"""Method of a handler -> from the original to ours."""


@patch(
    "vllm.entrypoints.serve.engine.serving:BaseServing.__init__",
    why=(
        "vLLM drops fields of a body that it does not know, renames those that it "
        "does, and repeats what was sent at any length. /v1/responses asks the engine "
        "when a streamed reply has begun: what that refuses ends the connection "
        "without a word. A suffix becomes part of the prompt or is refused. An answer "
        "has no place for what a model says of each token, and an error does not say "
        "what ended a request."
    ),
    upstream="docs/upstream.md#handlers-of-the-http-server-have-no-hook",
    drop_when=(
        "vLLM refuses unknown fields and names those that were sent, verifies sampling "
        "parameters before it streams, and an output can carry fields of a plugin"
    ),
    where=Where.SERVER,
    overrides=tuple(METHODS),
)
def base_serving_init(original: Callable[..., None]) -> Callable[..., None]:
    """Gives the handler a subclass that refuses fields which are meant as our options,
    remembers what the client calls a sampling parameter, cuts refusals short, checks
    requests before a stream begins, makes an option of a suffix, and adds step maps,
    fields and frames to answers."""

    def init(self: BaseServing, *args: Any, **kwargs: Any) -> None:
        self.__class__ = subclass(type(self))  # type: ignore[arg-type]
        original(self, *args, **kwargs)

    return init


@functools.cache
def subclass(kind: type) -> type:
    """A handler's class with our methods before its own; itself if it has none of them.

    Methods that a class replaces itself, as vLLM's subclasses of its chat handler may,
    are left alone.

    Raises:
        RuntimeError: this vLLM has no such method.
    """
    bases = {f"{base.__module__}:{base.__qualname__}": base for base in kind.__mro__}
    ours = {}
    for symbol, make in METHODS.items():
        owner, _, name = symbol.rpartition(".")
        if owner not in bases:
            continue
        original = vars(bases[owner]).get(name)
        if original is None:
            raise RuntimeError(missing(symbol))
        if getattr(kind, name) is original:
            ours[name] = functools.wraps(original)(make(original))
    if not ours:
        return kind
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names | ours)
