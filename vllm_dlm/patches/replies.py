# SPDX-License-Identifier: Apache-2.0
"""Answers of the HTTP server: step maps and fields in them, and why there is none.

Methods of vLLM's handlers, from the original to ours; `handlers.py` puts them in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission import broken_logits
from vllm_dlm.admission.sampling_params import is_ours
from vllm_dlm.entrypoints import canvas_fields, step_maps
from vllm_dlm.entrypoints.results import watched

if TYPE_CHECKING:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.outputs import RequestOutput


def raise_if_error(original: Callable[..., Any]) -> Callable[..., Any]:
    """Says of our models that the logits were no numbers, where vLLM says `Internal
    server error`, whatever ended a request."""
    from vllm.exceptions import GenerationError

    def check(self: GenerateBaseServing, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except GenerationError as error:
            if not is_ours(self.model_config.hf_config):
                raise
            # All else that ends a request in an error is refused at admission.
            raise type(error)(broken_logits.REASON) from None

    return check


def completion_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `step_map` to the choices of completions that asked for it, and `fields`
    where holes have names."""

    def respond(
        self: OpenAIServingCompletion,
        results: list[RequestOutput],
        request: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        response = original(self, results, request, *args, **kwargs)
        if is_ours(self.model_config.hf_config):
            outputs = [output for result in results for output in result.outputs]
            step_maps.add_to_choices(response.choices, outputs)
            canvas_fields.add_to_choices(
                response.choices, outputs, request.vllm_xargs, self.model_config
            )
        return response

    return respond


def chat_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for chats; keeps the last output it is given, to read the maps off."""

    async def respond(
        self: OpenAIServingChat,
        chat_request: Any,
        results: AsyncIterator[RequestOutput],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        seen: deque[RequestOutput] = deque(maxlen=1)
        passing = watched(results, seen.append)
        response = await original(self, chat_request, passing, *args, **kwargs)
        # Not an error's answer, which has none.
        choices = getattr(response, "choices", None)
        if choices and is_ours(self.model_config.hf_config):
            outputs = seen[0].outputs
            step_maps.add_to_choices(choices, outputs)
            canvas_fields.add_to_choices(
                choices, outputs, chat_request.vllm_xargs, self.model_config
            )
        return response

    return respond
