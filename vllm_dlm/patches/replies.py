# SPDX-License-Identifier: Apache-2.0
"""Answers of the HTTP server: what vLLM has no place for, and errors that say why.

Methods of vLLM's handlers, from the original to ours; `handlers.py` puts them in.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission import broken_logits
from vllm_dlm.admission.sampling_params import is_ours
from vllm_dlm.entrypoints import canvas_fields, frames, step_maps
from vllm_dlm.entrypoints.frame_streams import FrameForm, StreamWatcher, interleaved
from vllm_dlm.entrypoints.results import watched

if TYPE_CHECKING:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.outputs import RequestOutput
    from vllm.tokenizers import TokenizerLike


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
    """Adds `step_map` to the choices of completions that asked for it, and
    `canvas_fields` where holes have names."""

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
                response.choices, outputs, request, self.model_config
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
                choices, outputs, chat_request, self.model_config
            )
        return response

    return respond


def completion_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    """Puts frames between the chunks of a stream whose request asked for them, and
    `canvas_fields` into those that end a choice."""

    def stream(
        self: OpenAIServingCompletion,
        request: Any,
        engine_inputs: Any,
        results: AsyncIterator[tuple[int, RequestOutput]],
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        def answer(results: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
            generator: AsyncGenerator[str, None] = original(
                *(self, request, engine_inputs, results, request_id, created_time),
                *(model_name, *args),
                **kwargs,
            )
            return generator

        about = {
            "id": request_id,
            "object": "text_completion",
            "created": created_time,
            "model": model_name,
        }
        nothing = {"text": "", "logprobs": None}
        made = canvas_fields.with_fields(answer, request, self.model_config)
        return _with_frames(made, results, about, nothing, kwargs.get("tokenizer"))

    return stream


def chat_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for chats."""

    def stream(
        self: OpenAIServingChat,
        request: Any,
        results: AsyncIterator[RequestOutput],
        request_id: str,
        model_name: str,
        conversation: Any,
        tokenizer: TokenizerLike | None,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        def answer(results: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
            generator: AsyncGenerator[str, None] = original(
                *(self, request, results, request_id, model_name, conversation),
                *(tokenizer, *args),
                **kwargs,
            )
            return generator

        about = {
            "id": request_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model_name,
        }
        made = canvas_fields.with_fields(answer, request, self.model_config)
        return _with_frames(made, results, about, {"delta": {}}, tokenizer)

    return stream


def _with_frames(
    answer: Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]],
    results: AsyncIterator[Any],
    about: dict[str, Any],
    nothing: dict[str, Any],
    tokenizer: TokenizerLike | None,
) -> AsyncGenerator[str, None]:
    """A streamed answer, with frames if somebody watches; else the answer itself.

    Args:
        answer: makes vLLM's stream of the engine's results.
        about: see `FrameForm`, `nothing` too.
    """
    watcher = frames.watcher()
    if not isinstance(watcher, StreamWatcher) or not watcher:
        return answer(results)
    form = FrameForm(about, nothing, tokenizer, with_text=watcher.with_text)
    return interleaved(answer(watched(results, watcher.count)), watcher, form)
