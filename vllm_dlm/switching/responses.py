# SPDX-License-Identifier: Apache-2.0
"""Who wrote what, in the server's answers.

Each choice of a completion or chat gets `segments`: neighbouring tokens of one model,
as `[{"model": "small", "tokens": 12}, ...]`. In a stream, each chunk has those of its
own tokens. vLLM's handlers have no place for that, so those of completions and chats
are wrapped, as objects; vLLM's classes stay as they are. So is what a pair must refuse
before an answer begins.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_dlm.entrypoints.results import watched
from vllm_dlm.switching.client import PairClient
from vllm_dlm.switching.text import PairOutput, Segment

FIELD = "segments"
_EVENT = "data: "


def report_writers(state: Any) -> None:
    """Wrap the handlers of completions and chats.

    Args:
        state: of the application, after vLLM's `init_app_state`.
    """
    completion = state.openai_serving_completion
    completion.request_output_to_completion_response = _completion(
        completion.request_output_to_completion_response
    )
    completion.completion_stream_generator = _completion_stream(
        completion.completion_stream_generator
    )
    chat = state.openai_serving_chat
    chat.chat_completion_full_generator = _chat(chat.chat_completion_full_generator)
    chat.chat_completion_stream_generator = _chat_stream(
        chat.chat_completion_stream_generator
    )
    batch = state.openai_serving_chat_batch
    batch.chat_completion_full_generator_batch = _chat_batch(
        batch.chat_completion_full_generator_batch
    )
    for handler in (completion, chat):
        handler.beam_search = _refuse_beam_search
    responses = state.openai_serving_responses
    responses._generate_with_builtin_tools = _checked_first(
        state.engine_client, responses._generate_with_builtin_tools
    )


def _refuse_beam_search(*args: Any, **kwargs: Any) -> Any:
    # It would ask for one token at a time, and the small model would write them all.
    raise VLLMValidationError(
        "use_beam_search is not supported where two models write one text"
    )


def _checked_first(
    client: PairClient, generate: Callable[..., Any]
) -> Callable[..., Any]:
    """The handler of `/v1/responses` asks the engine when its stream has begun."""

    def checked(*args: Any, sampling_params: Any, **kwargs: Any) -> Any:
        client.check_sampling(sampling_params)
        return generate(*args, sampling_params=sampling_params, **kwargs)

    return checked


def _described(segments: list[Segment]) -> list[dict[str, Any]]:
    """Segments for JSON; neighbours of one model become one."""
    merged: list[dict[str, Any]] = []
    for segment in segments:
        if merged and merged[-1]["model"] == segment.model:
            merged[-1]["tokens"] += segment.tokens
        else:
            merged.append({"model": segment.model, "tokens": segment.tokens})
    return merged


def _add(choices: list[Any], outputs: list[PairOutput]) -> None:
    for choice, output in zip(choices, outputs, strict=True):
        setattr(choice, FIELD, _described(output.segments))


def _completion(respond: Callable[..., Any]) -> Callable[..., Any]:
    def with_segments(results: list[Any], *args: Any, **kwargs: Any) -> Any:
        response = respond(results, *args, **kwargs)
        outputs = [output for result in results for output in result.outputs]
        _add(response.choices, outputs)
        return response

    return with_segments


def _chat(respond: Callable[..., Any]) -> Callable[..., Any]:
    async def with_segments(
        request: Any, results: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> Any:
        seen: deque[Any] = deque(maxlen=1)
        passing = watched(results, seen.append)
        response = await respond(request, passing, *args, **kwargs)
        # An error's answer has no choices.
        if choices := getattr(response, "choices", None):
            _add(choices, seen[0].outputs)
        return response

    return with_segments


def _chat_batch(respond: Callable[..., Any]) -> Callable[..., Any]:
    async def with_segments(
        request: Any, conversations: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        seen: list[deque[Any]] = [deque(maxlen=1) for _ in conversations]
        passing = [
            watched(results, last.append)
            for results, last in zip(conversations, seen, strict=True)
        ]
        response = await respond(request, passing, *args, **kwargs)
        if choices := getattr(response, "choices", None):
            _add(choices, [output for (last,) in seen for output in last.outputs])
        return response

    return with_segments


class _Stream:
    """Takes segments off the results and puts them into the chunks made of them."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Segment]] = defaultdict(list)

    def see(self, result: Any, first_choice: int = 0) -> None:
        """A result that the handler is about to read."""
        for output in result.outputs:
            self._waiting[first_choice + output.index] += output.segments

    def describe(self, event: str) -> str:
        """A server-sent event with `segments` in its choices."""
        if not event.startswith(f"{_EVENT}{{"):
            return event
        chunk = json.loads(event.removeprefix(_EVENT))
        for choice in chunk.get("choices", ()):
            # The first chunk of a chat only says who speaks.
            if choice.get("finish_reason") is None and choice.get("delta", {}).get(
                "role"
            ):
                continue
            choice[FIELD] = _described(self._waiting.pop(choice["index"], []))
        return f"{_EVENT}{json.dumps(chunk, ensure_ascii=False)}\n\n"


def _completion_stream(stream: Callable[..., Any]) -> Callable[..., Any]:
    async def with_segments(
        request: Any,
        inputs: Any,
        results: AsyncIterator[Any],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        seen = _Stream()

        def see(indexed: tuple[int, Any]) -> None:
            prompt_index, result = indexed
            seen.see(result, prompt_index * (request.n or 1))

        passing = watched(results, see)
        async for event in stream(request, inputs, passing, *args, **kwargs):
            yield seen.describe(event)

    return with_segments


def _chat_stream(stream: Callable[..., Any]) -> Callable[..., Any]:
    async def with_segments(
        request: Any, results: AsyncIterator[Any], *args: Any, **kwargs: Any
    ) -> AsyncIterator[str]:
        seen = _Stream()
        passing = watched(results, seen.see)
        async for event in stream(request, passing, *args, **kwargs):
            yield seen.describe(event)

    return with_segments
