# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters of a text that two models write, and of each model's turn.

A turn is a request of its own, with the text so far as its prompt. Parameters that look
at what was written either count over the whole text (lengths, stop strings, seed), or
are refused, never half applied.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_dlm.switching.entropy import PREFIX, Model, SwitchRule, rule_of_request
from vllm_dlm.switching.entropy_stop import KEY, stop_options

SAME_IN_EVERY_TURN = (
    "repetition_penalty",  # counts the prompt too
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "logit_bias",
    "allowed_token_ids",
    "ignore_eos",
    "logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stream_interval",
)
"""Fields of `SamplingParams` that a turn has as the text has them."""

OF_THE_TEXT = (
    "n",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "prompt_logprobs",
    "skip_reading_prefix_cache",
    "detokenize",
    "output_kind",
    "extra_args",
    "skip_clone",
    "output_text_buffer_length",
)
"""Fields that are worked out for each turn, or belong to the text as a whole."""

_WRITTEN = "it looks at what was written, and a turn does not see earlier turns so"
REFUSED = {
    "presence_penalty": f"{_WRITTEN}; repetition_penalty works",
    "frequency_penalty": f"{_WRITTEN}; repetition_penalty works",
    "structured_outputs": "a grammar begins anew with every turn",
    "bad_words": f"{_WRITTEN}; logit_bias works",
    "repetition_detection": _WRITTEN,
    "thinking_token_budget": _WRITTEN,
    "trace_decode_token_ids": "it replays one model",
    "watermarking": _WRITTEN,
    "flat_logprobs": "take logprobs as they are",
    "prompt_logprob_token_ids": "ask one model by itself",
    "prompt_logprob_start": "ask one model by itself",
    "logprob_token_ids": "ask one model by itself",
    "routed_experts_prompt_start": "expert choices are not returned",
}
"""Fields that are refused when set, and why."""


REFUSED_EXTRAS = {
    "kv_transfer_params": "the text is computed by two engines",
    KEY: f"it is set for each turn; a request sets {PREFIX}tau and its like",
}
"""Keys of `extra_args` that are refused, and why."""


@cache
def _unset() -> dict[str, Any]:
    unset = SamplingParams()
    return {
        name: getattr(unset, name)
        for name in SamplingParams.__struct_fields__
        if not name.startswith("_")
    }


def check_sampling(params: Any, rule: SwitchRule, stop_token_id: int) -> SwitchRule:
    """Check a request's parameters; returns the rule that it asks for.

    Raises:
        VLLMValidationError: something is not supported or not valid (HTTP 400).
    """
    if not isinstance(params, SamplingParams):
        raise VLLMValidationError(
            "two models write a text by sampling only; beam search and pooling are not "
            "supported"
        )
    for name, default in _unset().items():
        if name in SAME_IN_EVERY_TURN or name in OF_THE_TEXT:
            continue
        value = getattr(params, name)
        # Not `==` alone: one of the fields may be an array.
        if value is None or value is False or value is default:
            continue
        if isinstance(value, int | float | list) and value == default:
            continue
        reason = REFUSED.get(name, "this version of vllm-dlm does not know it")
        raise VLLMValidationError(
            f"{name} is not supported where two models write one text: {reason}"
        )
    if stop_token_id in (params.allowed_token_ids or ()):
        raise VLLMValidationError(
            f"allowed_token_ids: {stop_token_id} is the token reserved for switching"
        )
    extra_args = params.extra_args or {}
    for name, reason in REFUSED_EXTRAS.items():
        if name in extra_args:
            raise VLLMValidationError(
                f"{name} is not supported where two models write one text: {reason}"
            )
    try:
        return rule_of_request(rule, extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None


def turn_params(
    params: SamplingParams,
    rule: SwitchRule,
    model: Model,
    *,
    written: int,
    max_tokens: int,
    index: int,
    stop_token_id: int,
) -> SamplingParams:
    """Parameters of a turn.

    Args:
        params: the text's.
        rule: the text's.
        model: whose turn it is.
        written: tokens of the text so far.
        max_tokens: of the whole text.
        index: which of the request's `n` texts.
        stop_token_id: the reserved token.
    """
    # The prompt's logprobs come with the first turn.
    prompt_logprobs = params.prompt_logprobs if written == 0 else None
    wants_prompt = params.prompt_logprobs is not None
    others = {
        key: value
        for key, value in (params.extra_args or {}).items()
        if not key.startswith(PREFIX)
    }
    return SamplingParams(
        **{name: getattr(params, name) for name in SAME_IN_EVERY_TURN},
        seed=_turn_seed(params.seed, index, written),
        max_tokens=max_tokens - written,
        min_tokens=max(0, params.min_tokens - written),
        stop_token_ids=[*(params.stop_token_ids or ()), stop_token_id],
        prompt_logprobs=prompt_logprobs,
        skip_reading_prefix_cache=(
            None if wants_prompt else params.skip_reading_prefix_cache
        ),
        # The text is put together elsewhere; logprobs get their tokens' names here.
        detokenize=params.detokenize
        and (params.logprobs is not None or prompt_logprobs is not None),
        output_kind=RequestOutputKind.DELTA,
        extra_args={**others, **stop_options(rule, model, stop_token_id)},
    )


def _turn_seed(seed: int | None, index: int, written: int) -> int | None:
    """Other noise for every turn; the first turn's is that of the model alone."""
    if seed is None:
        return None
    if written == 0:
        return seed + index  # as vLLM gives the `n` texts of a request
    name = f"{seed + index}:{written}".encode()
    return int.from_bytes(blake2b(name, digest_size=7).digest())
