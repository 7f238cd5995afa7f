# SPDX-License-Identifier: Apache-2.0
"""Admission of a request: what is honoured, what is refused, nothing ignored.

vLLM refuses most sampling parameters for its own diffusion model; ours honour them.
What they cannot honour is refused here, in the API process, as HTTP 400.
"""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission.bounds import check_bounds
from vllm_dlm.admission.client_fields import field_of, options_field
from vllm_dlm.admission.numbers import check_numbers
from vllm_dlm.messages import OptionError, bounded, name_of, quote

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.config.options import DlmConfig
    from vllm_dlm.config.request import RequestConfig

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
        # Read below.
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
    "structured_outputs": "a grammar needs text that grows from left to right",
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

DIFFUSION_GEMMA = "diffusion_"
"""Prefix of the `extra_args` keys of vLLM's own diffusion model."""


def is_ours(hf_config: Any) -> bool:
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
        return _check_options(params, model_config)
    except ValueError as error:
        # Also of a strategy, or of a cache policy, which do not know who asks.
        path = getattr(error, "field", None)
        carrier = options_field() + (f".{name_of(path)}" if path else "")
        raise refusal(OptionError(str(error), carrier)) from error


def refusal(error: ValueError) -> VLLMValidationError:
    """What a client is told: a text of bounded length, and the field it sent.

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


def _check_options(params: SamplingParams, model_config: ModelConfig) -> RequestConfig:
    from vllm_dlm.config.model import ModelDefaults
    from vllm_dlm.config.options import LONGEST_REQUEST_BLOCK, served_config
    from vllm_dlm.config.request import resolve
    from vllm_dlm.config.tccf import Stages
    from vllm_dlm.option_types import WHOLE_CANVAS

    for key in params.extra_args or ():
        if str(key).startswith(DIFFUSION_GEMMA):
            raise OptionError(
                f"{quote(key)} is an option of DiffusionGemma; the options of this "
                "model begin with `dlm_`, or sit in `dlm`",
                str(key),
            )
    hf_config = model_config.hf_config
    server = served_config(hf_config)
    defaults = ModelDefaults.from_hf_config(hf_config)
    config = resolve(server, params.extra_args, defaults)
    canvas = server.canvas_limit(model_config.max_model_len, defaults.max_canvas)
    # A request without max_tokens takes what the context leaves: a whole canvas.
    config = config.sized(params.max_tokens or canvas, canvas)
    own = server.block_length or defaults.block_length
    limit = canvas
    if own != WHOLE_CANVAS:
        limit = min(max(int(own), LONGEST_REQUEST_BLOCK), canvas)
    if config.block_length > limit:
        raise ValueError(
            f"block_length {config.block_length} is more than this server takes in a "
            f"request: {limit}; ask for less (for the whole canvas, lower max_tokens), "
            "or start the server with --dlm-block-length canvas"
        )
    stages = Stages.of(config.tccf, model_config)
    if stages is not None and (params.logprobs is not None or config.step_map):
        raise ValueError(
            "tccf cannot be combined with logprobs or step_map: the check text is not "
            "the model's; ask for one or the other"
        )
    check_strategy(
        config, server, model_config, params.max_tokens or model_config.max_model_len
    )
    return config


def check_strategy(
    config: RequestConfig,
    server: DlmConfig,
    model_config: ModelConfig,
    max_tokens: int | None = None,
) -> None:
    """What a strategy itself asks of the model, the cache policy and files.

    Args:
        config: of a request, `sized`.
        max_tokens: of the request; None for what is not one.

    Raises:
        ValueError: its parameters do not fit them.
    """
    import torch

    from vllm_dlm.strategies import STRATEGIES
    from vllm_dlm.strategies.base import Context

    # The second stage of `tccf` is decoded in blocks of one.
    lengths = {config.block_length, 1} if config.tccf else {config.block_length}
    for length in sorted(lengths, reverse=True):
        positions = None
        if max_tokens is not None:
            positions = -(-min(max_tokens, model_config.max_model_len) // length)
            positions *= length
        context = Context(
            device=torch.device("cpu"),
            model=model_config.model,
            model_class=model_config.hf_config.dlm_class,
            cache=config.cache,
            options=server.strategy_options(),
            positions=positions,
        )
        STRATEGIES[config.strategy].validate(config.params, length, context)


def stop_ids(params: SamplingParams) -> frozenset[int]:
    """Token ids at which the scheduler ends a request."""
    ids = set(params.stop_token_ids or ())
    # vLLM leaves this None under ignore_eos.
    if params.eos_token_id is not None:
        ids.add(params.eos_token_id)
    return frozenset(ids)


def refuse_beam_search(model_config: ModelConfig | None) -> None:
    """Beam search extends texts token by token, which no diffusion model does.

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
    """A canvas is laid out for `max_tokens`: what does not fit is no silent cut.

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


SERVER_OPTIONS: dict[str, str] = {
    "--logits-processors": "model_config.logits_processors",
    "--enable-trace-replay": "model_config.enable_trace_replay",
    "--watermark-config": "watermark_config",
    # vLLM applies an adapter to one row of logits per request.
    "--enable-lora": "lora_config",
    "--kv-transfer-config": "kv_transfer_config",
    # It computes prompts by fewer layers: nothing of them is sampled.
    "--kv-sharing-fast-prefill": "cache_config.kv_sharing_fast_prefill",
    # A canvas is token ids.
    "--enable-prompt-embeds": "model_config.enable_prompt_embeds",
    "--kv-offloading-size": "cache_config.kv_offloading_size",
    # Step maps travel where these would.
    "--enable-return-routed-experts": "aux_output_config.enable_return_routed_experts",
    "--enable-dbo": "parallel_config.enable_dbo",
    "--enable-batch-sharded-sampling": "parallel_config.enable_batch_sharded_sampling",
}
"""Server options that the engine would ignore: flag -> where `VllmConfig` keeps it."""


def refuse_server_options(vllm_config: Any) -> None:
    """Refuse server options that the engine would ignore; for the config hook.

    Raises:
        ValueError: such an option is set.
    """
    for flag, path in SERVER_OPTIONS.items():
        if attrgetter(path)(vllm_config):
            raise ValueError(
                f"{flag} is not supported for diffusion language models; remove it"
            )
    model_config = vllm_config.model_config
    if model_config.runner_type == "pooling":
        raise ValueError(
            "--runner pooling and --convert are not supported for diffusion language "
            "models, which write text; remove them"
        )
    mode = model_config.logprobs_mode
    if mode != "raw_logprobs":
        raise ValueError(
            f"--logprobs-mode {mode} is not supported for diffusion language models; "
            "only raw_logprobs is"
        )
