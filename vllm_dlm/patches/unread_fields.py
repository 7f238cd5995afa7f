# SPDX-License-Identifier: Apache-2.0
"""What a client has sent and vLLM would not read is refused by the route's handler.

Here the body is known as it came, under the client's own names. `handle` makes methods
of the HTTP server's handlers (`handlers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission import sampling_params as request
from vllm_dlm.admission import suffixes
from vllm_dlm.admission.client_fields import GENERATE, Route, sent_by
from vllm_dlm.admission.stray_options import find_stray, refuse_best_of, refuse_stray
from vllm_dlm.admission.waiting import with_constraints
from vllm_dlm.entrypoints import frames
from vllm_dlm.entrypoints.frame_streams import StreamWatcher
from vllm_dlm.messages import OptionError, name_of
from vllm_dlm.patches.ledger import Make

if TYPE_CHECKING:
    from starlette.requests import Request
    from vllm.entrypoints.serve.engine.serving import BaseServing


NULL_IS_DEFAULT = ("background", "truncation")
"""Fields of `/v1/responses` that may be null. vLLM's answer repeats them, and may not
hold a null: a stream would break off, and other answers be a 500. See
docs/upstream.md#nulls-of-a-responses-request-break-its-stream."""


def handle(route: Route, *, has_frames: bool = False) -> Make:
    """A route's handler: what the client sent is known here, under its own names.

    Args:
        has_frames: the route's streams have frames.
    """

    def watched() -> AbstractContextManager[object]:
        return frames.watching(StreamWatcher()) if has_frames else nullcontext()

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def answer(self: BaseServing, *args: Any, **kwargs: Any) -> Any:
            from vllm.exceptions import VLLMValidationError

            given = dict(zip(("request", "raw_request"), args, strict=False)) | kwargs
            body, raw_request = given["request"], given.get("raw_request")
            with sent_by(route, body) as is_first:
                if not is_first:
                    return await original(self, *args, **kwargs)
                ours = request.is_ours(self.model_config.hf_config)
                try:
                    await _refuse_unread(route, body, raw_request, ours)
                    if ours and getattr(body, "suffix", None) is not None:
                        given["request"] = suffixes.as_option(body)
                    if not ours:
                        return await original(self, *args, **kwargs)
                    _fill_nulls(body)

                    async def once(own: Any) -> Any:
                        sent = {**given, "request": own}
                        with watched():
                            return await original(self, **sent)

                    return await with_constraints(given["request"], once)
                except OptionError as error:
                    raise request.refusal(error) from None
                except VLLMValidationError as error:
                    raise request.as_sent(suffixes.as_sent(error, body), ours) from None

        return answer

    return make


def _fill_nulls(body: Any) -> None:
    fields = type(body).model_fields
    for name in NULL_IS_DEFAULT:
        if name in fields and getattr(body, name) is None:
            setattr(body, name, fields[name].default)


async def _refuse_unread(
    route: Route, body: Any, raw_request: Request | None, ours: bool
) -> None:
    """Refuse fields that are meant for us, and that vLLM would drop without a word.

    Args:
        body: of the request, as one of vLLM's protocol classes.
        ours: whether the model is one of ours.

    Raises:
        OptionError: it names the first.
    """
    unread = body.model_extra
    sent: Mapping[str, Any] = {}
    if unread is None:
        if raw_request is not None:
            # FastAPI has parsed it, and keeps it.
            sent = await raw_request.json()
        unread = _without(sent, type(body).model_fields)
    # A batch of chats has it from chats: it is no field of its own class.
    refuse_stray(_without(unread, (route.options,)), route.options, ours=ours)
    if ours:
        refuse_best_of(unread, getattr(body, "n", None))
    if route is GENERATE:
        inner = sent.get("sampling_params")
        if isinstance(inner, Mapping):
            known = type(body.sampling_params).__struct_fields__
            refuse_stray(_without(inner, known), route.options, route.prefix, ours=ours)
    template = getattr(body, "chat_template_kwargs", None)
    if template and (found := find_stray(template, ours=False)):
        raise OptionError(
            f"chat_template_kwargs: {name_of(found[0])} is for the template there; put "
            f'options into "{route.options}"',
            "chat_template_kwargs",
        )


def _without(sent: Mapping[str, Any], known: Any) -> dict[str, Any]:
    return {name: value for name, value in sent.items() if name not in known}
