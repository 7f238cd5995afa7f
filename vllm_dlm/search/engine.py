# SPDX-License-Identifier: Apache-2.0
"""A `vllm.LLM` in this process, as the engine of a search."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import vllm
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

from vllm_dlm.config.model import ModelDefaults, as_ids
from vllm_dlm.config.options import served_config
from vllm_dlm.messages import quote, unknown
from vllm_dlm.search.adapter import BlockPace, TokenPace, with_options
from vllm_dlm.search.base import Kind, Text, Token
from vllm_dlm.search.jobs import Job, Pace, Reply
from vllm_dlm.search.prompts import (
    THE_DRIVERS,
    is_chat,
    refuse_the_drivers,
    token_ids,
)

CONTEXT = 6
"""Tokens of the prompt that the written ones are decoded behind: how some look depends
on what stands before."""

_numbers = count()


class OfflineEngine:
    """See `Engine`.

    Args:
        llm: the engine; it is left as it was.
        sampling: what every request has besides, as `SamplingParams` or its fields.

    Raises:
        ValueError: sampling parameters that are not valid, or are the driver's.
    """

    def __init__(self, llm: vllm.LLM, sampling: Any = None) -> None:
        self._engine = llm.llm_engine
        self._tokenizer = llm.get_tokenizer()
        self._base = read_sampling(sampling)
        self._jobs: dict[str, Job] = {}
        self._pieces: dict[str, _Piece] = {}
        config = self._engine.vllm_config
        model = config.model_config
        self.most_top = None if model.max_logprobs < 0 else model.max_logprobs
        self.stops = tuple(self._base.stop or ())
        self.kind: Kind = "autoregressive"
        self.pace: Pace = TokenPace()
        ends = {*as_ids(self._tokenizer.eos_token_id)}
        if hasattr(model.hf_config, "dlm_class"):
            defaults = ModelDefaults.from_hf_config(model.hf_config)
            self.kind = defaults.attention
            self.pace = BlockPace(
                served_config(model.hf_config),
                self._base.extra_args,
                defaults,
                model.max_model_len,
            )
            ends.update(defaults.stop_ids)
        else:
            ends.update(as_ids(model.try_get_generation_config().get("eos_token_id")))
        if self._base.ignore_eos:
            ends.clear()
        self.ends = frozenset[Token]({*ends, *(self._base.stop_token_ids or ())})

    def encode(self, prompt: Any) -> tuple[Token, ...]:
        """See `Engine`."""
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        if is_chat(prompt):
            ids = self._tokenizer.apply_chat_template(
                list(prompt),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
            return tuple(ids)
        return token_ids(prompt)

    def encode_text(self, text: str) -> tuple[Token, ...]:
        """See `Engine`."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, text: Text) -> str:
        """See `Engine`."""
        decode = self._tokenizer.decode
        before = list(text.prompt[-CONTEXT:])
        head = decode(before, skip_special_tokens=True)
        whole = decode([*before, *text.written], skip_special_tokens=True)
        if whole.startswith(head):
            return str(whole[len(head) :])
        return str(decode(list(text.written), skip_special_tokens=True))

    def vocabulary(self) -> Mapping[str, int] | None:
        """See `Engine`."""
        vocabulary: Mapping[str, int] = self._tokenizer.get_vocab()
        return vocabulary

    def check_options(self, options: Mapping[str, Any]) -> None:
        """See `Engine`."""
        if isinstance(self.pace, BlockPace):
            self.pace.resolve(options)

    def submit(self, job: Job) -> None:
        """See `Engine`."""
        name = f"search-{next(_numbers)}"
        prompt = {"prompt_token_ids": [*job.text.prompt, *job.text.written]}
        try:
            self._engine.add_request(name, prompt, self._params(job))
        except VLLMValidationError as error:
            raise ValueError(str(error)) from error
        self._jobs[name] = job
        self._pieces[name] = _Piece(job, len(prompt["prompt_token_ids"]))

    def _params(self, job: Job) -> SamplingParams:
        params = self._base.clone()
        params.n = 1
        params.max_tokens = job.max_tokens
        params.temperature = job.temperature
        params.seed = job.seed
        params.logprobs = job.top
        params.output_kind = RequestOutputKind.DELTA
        params.stop = [*self.stops, *job.stop]
        # Only to find stop strings: what is decoded, is decoded anew.
        params.detokenize = bool(params.stop)
        params.min_tokens = max(0, params.min_tokens - len(job.text.written))
        params.min_tokens = min(params.min_tokens, job.max_tokens)
        if job.options:
            options = {name: json.loads(value) for name, value in job.options}
            params.extra_args = with_options(params.extra_args or {}, options)
        # What the constructor works out and checks: greedy, lengths of stop strings.
        params.__post_init__()
        return params

    def poll(self) -> Iterable[tuple[Job, Reply]]:
        """See `Engine`."""
        done = []
        for output in self._engine.step():
            piece = self._pieces.get(output.request_id)
            if piece is None:
                continue
            if piece.add(output):
                if not output.finished:
                    self._engine.abort_request([output.request_id])
                del self._pieces[output.request_id]
                done.append((self._jobs.pop(output.request_id), piece.reply()))
        return done

    def cancel(self, jobs: Iterable[Job]) -> None:
        """See `Engine`."""
        unwanted = set(jobs)
        names = [name for name, job in self._jobs.items() if job in unwanted]
        if names:
            self._engine.abort_request(names)
        for name in names:
            del self._jobs[name], self._pieces[name]

    def close(self) -> None:
        """See `Engine`."""


class _Piece:
    """What a request has written so far."""

    def __init__(self, job: Job, prompt_tokens: int) -> None:
        self._job = job
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: tuple[tuple[Token, float], ...] = ()
        self._reason = "kept"
        self._stop: str | None = None

    def add(self, output: Any) -> bool:
        """Take what is new; whether there is enough.

        Raises:
            RuntimeError: the engine has given the request up.
        """
        (new,) = output.outputs
        if not self._tokens and new.logprobs and self._job.top:
            likeliest = sorted(new.logprobs[0].items(), key=lambda item: item[1].rank)
            self._top = tuple(
                (token, each.logprob) for token, each in likeliest[: self._job.top]
            )
        for token, known in zip(new.token_ids, new.logprobs or (), strict=True):
            self._tokens.append(token)
            self._logprobs.append(known[token].logprob)
        self._cached_tokens = output.num_cached_tokens or self._cached_tokens
        if output.finished:
            self._reason = str(new.finish_reason)
            if self._reason not in ("stop", "length"):
                raise RuntimeError(
                    f"the engine ended a request of the search: {self._reason}"
                )
            if isinstance(new.stop_reason, str):
                self._stop = new.stop_reason
            return True
        return self._job.keep is not None and len(self._tokens) >= self._job.keep

    def reply(self) -> Reply:
        return Reply(
            tuple(self._tokens),
            tuple(self._logprobs),
            self._reason,
            self._stop,
            self._top,
            self._prompt_tokens,
            self._cached_tokens,
            len(self._tokens),
        )


def read_sampling(sampling: Any) -> SamplingParams:
    """What every request of a search has besides what its driver sets.

    Raises:
        ValueError: it is not valid, or the driver's.
    """
    if sampling is None:
        return SamplingParams()
    if isinstance(sampling, BeamSearchParams):
        raise ValueError("sampling: beam search is a search of its own; leave it out")
    given: Mapping[str, Any]
    if isinstance(sampling, SamplingParams):
        unset = SamplingParams()
        given = {
            name: getattr(sampling, name)
            for name in THE_DRIVERS
            if getattr(sampling, name) != getattr(unset, name)
        }
    elif isinstance(sampling, Mapping):
        given = sampling
    else:
        raise ValueError(
            f"sampling: expected SamplingParams or its fields, got {quote(sampling)}"
        )
    refuse_the_drivers(given)
    if isinstance(sampling, SamplingParams):
        return sampling
    fields = [name for name in SamplingParams.__struct_fields__ if name[0] != "_"]
    for name in sampling:
        if name not in fields:
            raise ValueError(f"sampling: {unknown(name, fields)}")
    try:
        return SamplingParams(**sampling)
    except (VLLMValidationError, TypeError) as error:
        raise ValueError(f"sampling: {error}") from error
