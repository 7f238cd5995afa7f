# SPDX-License-Identifier: Apache-2.0
"""One text that two models write: what to ask next, and what the answers add to it.

`Text` knows no engine: offline and over HTTP, whoever drives it sends `next_turn` to
the engine it names, and gives every output of that engine to `add`. Text, stop strings
and lengths are those of the whole text, made with vLLM's own detokenizer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from vllm_dlm.switching.entropy import LARGE, SMALL, Model, SwitchRule
from vllm_dlm.switching.sampling import turn_params


@dataclass
class Segment:
    """Neighbouring tokens of one model."""

    model: Model
    tokens: int = 0
    prefill_tokens: int = 0
    """Tokens before the segment (prompt and text) that the model had to compute."""
    cached_tokens: int = 0
    """Tokens before the segment that were in the model's prefix cache."""


@dataclass
class PairOutput(CompletionOutput):
    """A `CompletionOutput` that says who wrote what."""

    segments: list[Segment] = field(default_factory=list)

    @property
    def models(self) -> list[Model]:
        """The model that wrote each token."""
        return [each.model for each in self.segments for _ in range(each.tokens)]

    @property
    def switches(self) -> list[int]:
        """Index of each token at which another model goes on."""
        ends, end = [], 0
        for segment in self.segments[:-1]:
            end += segment.tokens
            ends.append(end)
        return ends

    @property
    def tokens_by_model(self) -> dict[Model, int]:
        """Tokens that each model wrote."""
        counts: dict[Model, int] = {SMALL: 0, LARGE: 0}
        for segment in self.segments:
            counts[segment.model] += segment.tokens
        return counts

    @property
    def catch_up_tokens(self) -> int:
        """Tokens computed a second time, or by the other model first: the price of
        switching, beside one forward for each switch."""
        return sum(segment.prefill_tokens for segment in self.segments[1:])

    @property
    def cached_tokens(self) -> int:
        """Tokens that were found in a prefix cache when a model took over."""
        return sum(segment.cached_tokens for segment in self.segments[1:])


@dataclass(frozen=True)
class TextRequest:
    """What a client asked for, checked."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    rule: SwitchRule
    stop_token_id: int
    max_model_len: int
    tokenizer: Any
    cache_salt: str | None = None

    @property
    def max_tokens(self) -> int:
        """Most tokens that the text may have."""
        room = self.max_model_len - len(self.prompt_token_ids)
        return room if self.params.max_tokens is None else self.params.max_tokens

    def output(
        self, outputs: Sequence[PairOutput], first: RequestOutput | None, finished: bool
    ) -> RequestOutput:
        """The answer to the client.

        Args:
            outputs: of its texts.
            first: an engine's first output for it, for what that says of the prompt.
            finished: whether this is the last answer.
        """
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs if first else None,
            outputs=list(outputs),
            finished=finished,
            num_cached_tokens=first.num_cached_tokens if first else None,
        )


class Text:
    """One text of a request.

    Args:
        request: what it is for.
        index: which of the request's `n` texts.
    """

    def __init__(self, request: TextRequest, index: int = 0) -> None:
        self.request = request
        self.index = index
        self.model: Model = SMALL
        """The model whose turn it is."""
        self.first: RequestOutput | None = None
        """The first output of the first turn."""
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._segments: list[Segment] = []
        self._token_ids: list[int] = []
        self._logprobs: list[Any] = []
        self._sent = 0
        self._in_turn = False
        self._detokenizer = self._make_detokenizer()

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be written."""
        return self.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """Whether `output` would say more than the last time."""
        return self.finished or len(self._token_ids) > self._sent

    @property
    def segments(self) -> list[Segment]:
        """Which model wrote which tokens so far."""
        return self._segments_from(0)

    def next_turn(self) -> tuple[Any, SamplingParams]:
        """What to ask the engine of `model` now: rendered prompt and parameters."""
        request = self.request
        self._segments.append(Segment(self.model))
        self._in_turn = False
        params = turn_params(
            request.params,
            request.rule,
            self.model,
            written=len(self._token_ids),
            max_tokens=request.max_tokens,
            index=self.index,
            stop_token_id=request.stop_token_id,
        )
        prompt = tokens_input(
            [*request.prompt_token_ids, *self._token_ids],
            cache_salt=request.cache_salt,
        )
        return prompt, params

    def add(self, output: RequestOutput) -> bool:
        """Take in an output of the turn's engine.

        Returns:
            Whether the turn is over: the text is finished, or `next_turn` is due. The
            engine may still be at it, if the text ended with a stop string.
        """
        if not self._in_turn:
            self._begin(output)
        delta: CompletionOutput = output.outputs[0]
        token_ids = list(delta.token_ids)
        logprobs = list(delta.logprobs or ())
        hands_over = delta.stop_reason == self.request.stop_token_id
        if hands_over:
            token_ids.pop()
            del logprobs[len(token_ids) :]
        ends = delta.finish_reason is not None and not hands_over
        stop_string = self._detokenizer.update(
            token_ids, stop_terminated=ends and delta.finish_reason == "stop"
        )
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._segments[-1].tokens += len(token_ids)
        if stop_string is not None:
            self._drop(len(self._token_ids) - self._detokenizer.num_output_tokens())
            self.finish_reason, self.stop_reason = "stop", stop_string
        elif ends:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason
        elif hands_over:
            self.model = LARGE if self.model == SMALL else SMALL
        return self.finished or hands_over

    def output(self, kind: RequestOutputKind) -> PairOutput:
        """The text so far, or with `DELTA` what is new since the last call."""
        is_delta = kind == RequestOutputKind.DELTA
        start = self._sent if is_delta else 0
        self._sent = len(self._token_ids)
        wants = self.request.params.logprobs is not None
        chosen = zip(self._token_ids, self._logprobs, strict=False)
        return PairOutput(
            index=self.index,
            text=self._detokenizer.get_next_output_text(self.finished, is_delta),
            token_ids=self._token_ids[start:],
            cumulative_logprob=(
                sum(each[token].logprob for token, each in chosen) if wants else None
            ),
            logprobs=self._logprobs[start:] if wants else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            segments=self._segments_from(start),
        )

    def _begin(self, output: RequestOutput) -> None:
        self._in_turn = True
        if self.first is None:
            self.first = output
        before = len(self.request.prompt_token_ids) + len(self._token_ids)
        segment = self._segments[-1]
        segment.cached_tokens = output.num_cached_tokens or 0
        segment.prefill_tokens = before - segment.cached_tokens

    def _drop(self, count: int) -> None:
        """Forget the last tokens, which came after a stop string."""
        if count:
            del self._token_ids[-count:], self._logprobs[-count:]
            self._segments[-1].tokens -= count

    def _segments_from(self, start: int) -> list[Segment]:
        """Segments of the tokens from `start` on; all, with their counts, from 0."""
        if start == 0:
            return [replace(each) for each in self._segments if each.tokens]
        segments, end = [], 0
        for each in self._segments:
            end += each.tokens
            new = min(each.tokens, end - start)
            if new > 0:
                segments.append(Segment(each.model, new))
        return segments

    def _make_detokenizer(self) -> IncrementalDetokenizer:
        request = self.request
        engine_request = EngineCoreRequest(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_features=None,
            sampling_params=request.params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        tokenizer = request.tokenizer if request.params.detokenize else None
        return IncrementalDetokenizer.from_new_request(tokenizer, engine_request)
