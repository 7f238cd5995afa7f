# SPDX-License-Identifier: Apache-2.0
"""What a model has written into the named holes of a `canvas_text`.

Offline, `canvas_fields` reads them off a finished output; over HTTP each choice has
them as its object `canvas_fields`: in a whole answer, and in the chunk of a stream that
says why the choice has finished.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.canvases import Named, taken_apart
from vllm_dlm.admission.sampling_params import is_ours
from vllm_dlm.config.request_options import read_request
from vllm_dlm.entrypoints.results import watched
from vllm_dlm.entrypoints.step_maps import has_step_map

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers import TokenizerLike

NAME = "canvas_fields"
"""Of the object in a choice."""

ENDS = '"finish_reason":"'
"""Stands in a chunk that ends a choice; quotes of a text would be escaped."""


def canvas_fields(
    output: RequestOutput | CompletionOutput,
    params: SamplingParams,
    tokenizer: TokenizerLike,
) -> dict[str, str]:
    """The texts in the named holes of a finished output, by name.

    Args:
        output: with `n` above 1 one of `RequestOutput.outputs`.
        params: with which it was asked for; their `canvas_text` names the holes.
        tokenizer: of the model, as `LLM.get_tokenizer` gives it.

    Raises:
        ValueError: there are several outputs, or the request has brought no such text.
    """
    completions: list[CompletionOutput] = getattr(output, "outputs", [output])
    if len(completions) != 1:
        raise ValueError(
            f"the request has {len(completions)} outputs, with fields each: pass one "
            "of its `outputs`"
        )
    holes = _named_holes(params.extra_args, tokenizer)
    if holes is None:
        raise ValueError(
            "the parameters have no canvas_text: its named holes are the fields"
        )
    return holes.texts(completions[0])


def add_to_choices(
    choices: Iterable[Any],
    outputs: Iterable[CompletionOutput],
    request: Any,
    model_config: ModelConfig,
) -> None:
    """Give each choice of a whole answer its fields, if its request has named some.

    Args:
        request: the body, as vLLM's protocol class.
    """
    holes = _holes_of(request, model_config)
    if holes is not None:
        for choice, output in zip(choices, outputs, strict=True):
            setattr(choice, NAME, holes.texts(output))


def with_fields(
    answer: Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]],
    request: Any,
    model_config: ModelConfig,
) -> Callable[[AsyncIterator[Any]], AsyncGenerator[str, None]]:
    """What streams an answer, with fields if its request has named some; else itself.

    Args:
        answer: makes vLLM's stream of the engine's results.
        request: the body, as vLLM's protocol class.
    """
    holes = _holes_of(request, model_config)
    if holes is None:
        return answer
    seen = _Streamed(holes, request.n or 1)

    async def stream(results: AsyncIterator[Any]) -> AsyncGenerator[str, None]:
        chunks = answer(watched(results, seen.take))
        try:
            async for chunk in chunks:
                yield seen.added_to(chunk) if ENDS in chunk else chunk
        finally:
            await chunks.aclose()

    return stream


@dataclass(frozen=True)
class _NamedHoles:
    """A request's holes that have names, in a text cut into tokens."""

    named: list[Named]
    tokenizer: TokenizerLike
    behind: list[int] | None = None
    """Of an elastic hole, tokens to its right."""

    def texts(self, output: CompletionOutput) -> dict[str, str]:
        """What a finished output has in them."""
        tokens = list(output.token_ids)
        if self.behind is not None:
            if output.finish_reason == "stop" and tokens[-1:] != self.behind[-1:]:
                tokens.pop()  # the end of the text
            end = len(tokens) - len(self.behind)
            return {
                hole.name: self.tokenizer.decode(
                    tokens[hole.start : end], skip_special_tokens=True
                )
                for hole in self.named
            }
        offsets: Iterable[float] = range(len(tokens))
        rows = output.routed_experts
        if rows is not None and rows.shape[1] > has_step_map(output) * 3:
            offsets = rows[: len(tokens), -1].tolist()  # holes that have shrunk
        at = {int(offset): token for offset, token in zip(offsets, tokens, strict=True)}
        return {
            hole.name: self.tokenizer.decode(
                [at[i] for i in range(hole.start, hole.start + hole.length) if i in at],
                skip_special_tokens=True,
            )
            for hole in self.named
        }


class _Streamed:
    """The choices of a stream, as far as vLLM has been handed them.

    Args:
        samples: choices of each prompt.
    """

    def __init__(self, holes: _NamedHoles, samples: int) -> None:
        self._holes = holes
        self._samples = samples
        self._tokens: dict[int, list[int]] = {}
        self._last: dict[int, CompletionOutput] = {}

    def take(self, result: RequestOutput | tuple[int, RequestOutput]) -> None:
        """Take over what is new in a result that vLLM is about to write."""
        prompt, output = result if isinstance(result, tuple) else (0, result)
        for one in output.outputs:
            choice = prompt * self._samples + one.index
            self._tokens.setdefault(choice, []).extend(one.token_ids)
            self._last[choice] = one

    def added_to(self, chunk: str) -> str:
        """A chunk whose choices have ended, with their fields."""
        data = json.loads(chunk.removeprefix("data: "))
        for choice in data["choices"]:
            if choice.get("finish_reason") is not None:
                index = choice["index"]
                # Rows come with the last result, of all tokens.
                whole = replace(self._last[index], token_ids=self._tokens[index])
                choice[NAME] = self._holes.texts(whole)
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        return f"data: {text}\n\n"


def _holes_of(request: Any, model_config: ModelConfig) -> _NamedHoles | None:
    """The named holes of an HTTP request; None if there are none."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if not (request.vllm_xargs and is_ours(model_config.hf_config)):
        return None
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is None:
        return None
    holes = _named_holes(request.vllm_xargs, tokenizer)
    return holes if holes is not None and holes.named else None


def _named_holes(
    extra_args: Mapping[str, Any] | None, tokenizer: TokenizerLike
) -> _NamedHoles | None:
    """The named holes of a request's text; None without such a text."""
    if not extra_args:
        return None
    canvas = read_request(extra_args).canvas
    text, behind = canvas.canvas_text, None
    if text is None:
        return None

    def tokenize(piece: str) -> list[int]:
        return list(tokenizer.encode(piece, add_special_tokens=False))

    tokens, holes, named = taken_apart(text, "canvas_text", tokenize, 0)
    if canvas.holes == "elastic":
        behind = tokens[sum(holes[0]) :]
    return _NamedHoles(named, tokenizer, behind)
