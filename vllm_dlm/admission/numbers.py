# SPDX-License-Identifier: Apache-2.0
"""Ranges of a request's numbers that are put into tensors, or index them.

The HTTP routes check some of these numbers; `/inference/v1/generate` and offline use
check few. A number that does not fit its tensor would end the engine, and with it
everybody's requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeGuard

from vllm_dlm.admission.client_fields import field_of
from vllm_dlm.messages import OptionError, quote

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

LEAST, MOST = -(2**63), 2**63 - 1
"""Least and largest integer of an int64, and of the messages between processes."""

MOST_TOKENS = 2**30
"""Largest count that is added to a prompt's length in int32."""

LARGEST_BIAS = 1e9
"""Largest bias of a logit: float32 holds its sum with any logit."""

RANGES: dict[str, tuple[int, int]] = {
    "n": (1, MOST_TOKENS),
    "max_tokens": (1, MOST_TOKENS),
    "min_tokens": (0, MOST_TOKENS),
    # More than there are tokens is all of them: as much as a message holds.
    "top_k": (-1, 2**64 - 1),
    "logprobs": (-1, MOST_TOKENS),
    "stream_interval": (1, MOST),
}
"""Parameter -> the least and the most it may be; all other integers are int64."""


def check_numbers(params: SamplingParams, model_config: ModelConfig) -> None:
    """Refuse numbers that the engine cannot hold, and ids that are no tokens.

    Raises:
        OptionError: it names the parameter as the client did, and what is valid.
    """
    for name in type(params).__struct_fields__:
        value = getattr(params, name)
        least, most = RANGES.get(name, (LEAST, MOST))
        if name == "seed" or name in RANGES:
            if value is not None and not _is_integer(value):
                raise _refusal(name, f"expected an integer, got {quote(value)}")
        elif name.startswith("_") or not isinstance(value, int):
            continue
        if value is not None and not least <= value <= most:
            raise _refusal(
                name, f"expected an integer from {least} to {most}, got {quote(value)}"
            )
    if params.repetition_detection is not None:
        for name, value in vars(params.repetition_detection).items():
            if isinstance(value, int) and value > MOST:
                raise _refusal("repetition_detection", f"{name} is at most {MOST}")
    size = model_config.get_vocab_size()
    _check_logprobs(params, model_config.max_logprobs, size)
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        check_ids(name, getattr(params, name) or (), size)
    for token, bias in (params.logit_bias or {}).items():
        if not isinstance(bias, int | float) or not abs(bias) <= LARGEST_BIAS:
            raise _refusal(
                "logit_bias",
                f"expected finite numbers from -{LARGEST_BIAS:g} to {LARGEST_BIAS:g}, "
                f"got {quote(bias)} for token {token}",
            )


def _check_logprobs(params: SamplingParams, most: int, vocab_size: int) -> None:
    if params.logprobs == -1:
        raise _refusal(
            "logprobs",
            "logprobs=-1 (the whole vocabulary) is not supported for diffusion "
            "language models; ask for a number, up to the server's --max-logprobs",
        )
    most = vocab_size if most == -1 else most
    if params.logprobs is not None and params.logprobs > most:
        raise _refusal(
            "logprobs",
            f"{params.logprobs} is more than this server's --max-logprobs, {most}",
        )


def check_ids(name: str, ids: Iterable[Any], vocab_size: int) -> None:
    """Refuse the first id that is no token of the model.

    Args:
        name: the parameter that holds them.
        ids: any number of them.
        vocab_size: ids go from 0 up to this.

    Raises:
        OptionError: it names the parameter as the client did, and the id.
    """
    for token in ids:
        if not _is_integer(token) or not 0 <= token < vocab_size:
            raise _refusal(
                name,
                f"{quote(token)} is no token of this model. Vocabulary size: "
                f"{vocab_size}, ids go from 0 to {vocab_size - 1}",
            )


def check_prompt(prompt: Any, model_config: ModelConfig) -> None:
    """Refuse a prompt with ids that the model has no embedding for.

    vLLM compares them with the larger of the model's and the tokenizer's vocabulary,
    and only when a streamed answer has begun.

    Args:
        prompt: as the engine takes it; only one of token ids is checked.
        model_config: of one of our models.

    Raises:
        OptionError: it says which id.
    """
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if ids is None or len(ids) == 0:
        return
    size = model_config.get_vocab_size()
    if min(ids) < 0 or max(ids) >= size:
        check_ids("prompt", ids, size)


def _is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, of Python or (offline) of numpy."""
    return isinstance(value, Integral)


def _refusal(parameter: str, text: str) -> OptionError:
    return OptionError(f"{field_of(parameter)}: {text}", parameter)
