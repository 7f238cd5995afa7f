# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of a request: each is honoured or refused, none is ignored.

vLLM refuses most sampling parameters for its own diffusion model; ours honour them.
What they cannot honour is refused here, in the API process, as HTTP 400. The request's
own options, in `extra_args`, are `options.py`'s.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.bounds import check_bounds
from vllm_dlm.admission.client_fields import (
    field_of,
    in_the_clients_words,
    options_field,
)
from vllm_dlm.admission.numbers import check_numbers
from vllm_dlm.admission.options import read_options
from vllm_dlm.config.request import RequestConfig
from vllm_dlm.messages import LONGEST_MESSAGE, OptionError, bounded, name_of, quote

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

KV_TRANSFER = "kv_transfer_params"
"""A field of bodies, which vLLM's front end hands on in `extra_args`."""

HONOURED = frozenset(
    {
        # The sampler.
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "logit_bias",
        "bad_words",
        "allowed_token_ids",
        "min_tokens",
        "ignore_eos",
        "logprobs",
        # See `structured.py`.
        "structured_outputs",
        # The scheduler, over finished tokens: lengths and stops.
        "max_tokens",
        "stop_token_ids",
        "repetition_detection",
        # The front end.
        "n",
        "stop",
        "include_stop_str_in_output",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "flat_logprobs",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        # A hint that cannot change a result: prefix caching is vLLM's affair.
        "skip_reading_prefix_cache",
        # See `options.py`.
        "extra_args",
    }
)
"""`SamplingParams` fields that mean what they say."""

_ORDER = "it counts the tokens written so far, and a canvas has no such order"
_PROMPT = "prompt tokens are read, not predicted, by a diffusion model"

REFUSED: dict[str, str] = {
    "presence_penalty": _ORDER,
    "frequency_penalty": _ORDER,
    "repetition_penalty": _ORDER,
    "prompt_logprobs": f"{_PROMPT} (`echo` with `logprobs`, and `echo` of a chat, "
    "ask for them too)",
    "prompt_logprob_token_ids": _PROMPT,
    "prompt_logprob_start": _PROMPT,
    "logprob_token_ids": "ask for `logprobs` instead",
    "thinking_token_budget": "it forces tokens into a text that grows left to right",
    "trace_decode_token_ids": "it forces tokens into a text that grows left to right",
    "watermarking": "the watermark is drawn from the token to the left",
    "routed_experts_prompt_start": "expert choices are not returned",
}
"""Fields that are refused when set, and why."""


def is_ours(hf_config: PretrainedConfig) -> bool:
    """Whether a model is served by this package (not vLLM's DiffusionGemma)."""
    return getattr(hf_config, "dlm_class", None) is not None


@cache
def _defaults() -> dict[str, Any]:
    """Public field of `SamplingParams` -> the value that means "not set"."""
    from vllm.sampling_params import SamplingParams

    unset = SamplingParams()
    return {
        name: getattr(unset, name)
        for name in SamplingParams.__struct_fields__
        if not name.startswith("_")
    }


def validate_sampling_params(
    params: SamplingParams, model_config: ModelConfig
) -> RequestConfig:
    """Check a request for one of our models; replaces vLLM's diffusion check.

    Returns:
        How the request will be decoded.

    Raises:
        VLLMValidationError: the request cannot be honoured (HTTP 400).
    """
    try:
        _check_fields(params, model_config)
        check_numbers(params, model_config)
        check_bounds(params, model_config)
    except ValueError as error:
        raise refusal(error) from error
    try:
        config = read_options(params, model_config)
    except ValueError as error:
        # Also of a strategy, or of a cache policy, which do not know who asks.
        path = getattr(error, "field", None)
        if path not in _defaults():  # an option, or nothing that has a name
            path = options_field() + (f".{name_of(path)}" if path else "")
        raise refusal(OptionError(str(error), path)) from error
    try:
        # Automata need numba, which nobody waits for who only lists the ledger.
        from vllm_dlm.admission.structured import constrain

        constrain(params, model_config, config)
    except OptionError as error:
        raise refusal(error) from None
    return config


def refusal(error: ValueError) -> VLLMValidationError:
    """The error that a client is told: of bounded length, and about the field it sent.

    Args:
        error: the `field` of an `OptionError` is a sampling parameter, or a field of
            the request.
    """
    from vllm.exceptions import VLLMValidationError

    parameter = getattr(error, "field", None)
    if parameter == "prompt" or parameter in _defaults():
        parameter = field_of(parameter)
    elif parameter is not None:
        parameter = bounded(parameter)
    return VLLMValidationError(bounded(str(error)), parameter=parameter)


def as_sent(error: VLLMValidationError, ours: bool) -> VLLMValidationError:
    """A refusal of vLLM's in the client's words, and of a length that can be sent.

    vLLM repeats what was sent, twice, whatever its length.
    """
    from vllm.exceptions import VLLMValidationError

    text = str(error.args[0]) if error.args else ""
    parameter, message = error.parameter, bounded(text)
    if ours:
        message = in_the_clients_words(message)
        parameter = parameter and in_the_clients_words(parameter)
    is_short = len(str(error)) <= LONGEST_MESSAGE
    if is_short and (message, parameter) == (text, error.parameter):
        return error
    return VLLMValidationError(message, parameter=parameter)


def _check_fields(params: SamplingParams, model_config: ModelConfig) -> None:
    for name, default in _defaults().items():
        if name in HONOURED:
            continue
        value = getattr(params, name)
        # Not `==` alone: one of the fields is an array.
        if value is None or value is False or (value is default):
            continue
        if isinstance(value, (int, float, str)) and value == default:
            continue
        reason = REFUSED.get(name, "this version of vllm-dlm does not know it")
        raise OptionError(
            f"{field_of(name)} is not supported for diffusion language models: "
            f"{reason}. Remove it from the request.",
            name,
        )
    if (params.extra_args or {}).get(KV_TRANSFER):
        raise OptionError(
            f"{KV_TRANSFER} is not supported for diffusion language models: no keys "
            "and values go from one engine to another. Remove it from the request.",
            KV_TRANSFER,
        )


def refuse_beam_search(model_config: ModelConfig | None) -> None:
    """Refuse beam search, which extends texts token by token.

    Raises:
        VLLMValidationError: the model is one of ours (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError

    if model_config is not None and is_ours(model_config.hf_config):
        raise VLLMValidationError(
            "beam search is not supported for diffusion language models: it extends "
            "texts token by token; use `n` with a temperature instead",
            parameter=field_of("use_beam_search"),
        )


def refuse_long_request(
    max_model_len: int, max_tokens: int | None, prompt_length: int
) -> None:
    """Refuse a `max_tokens` that does not fit, which vLLM would cut without a word.

    A canvas is laid out for `max_tokens`.

    Args:
        max_model_len: context length, in tokens.
        max_tokens: what the request asked for; None takes what is left.
        prompt_length: in tokens.

    Raises:
        VLLMValidationError: prompt and output do not fit (HTTP 400).
    """
    from vllm.exceptions import VLLMValidationError

    room = max(max_model_len - prompt_length, 0)
    if max_tokens is not None and max_tokens > room:
        name = field_of("max_tokens")
        remedy = f" or set {name} to at most {room}" if room else ""
        raise VLLMValidationError(
            f"the prompt has {prompt_length} tokens and {name} is {quote(max_tokens)}, "
            f"together more than the context length of {max_model_len}; shorten the "
            f"prompt{remedy}",
            parameter=name,
        )
