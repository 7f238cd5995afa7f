# SPDX-License-Identifier: Apache-2.0
"""Two models in one engine: their configurations, and whether they fit together.

The engine's own configuration is the tuned model's but for its architecture. The
base's is made of it alike wherever it is needed: by the front end, which checks it, and
by each worker.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

from vllm_dlm.config.engine_keys import STEERING
from vllm_dlm.steering.options import Steering
from vllm_dlm.steering.tokens import refuse_other_tokens

ARCHITECTURE = "DlmSteeredForCausalLM"


def steering_of(config: VllmConfig) -> Steering:
    """What an engine's processes were told.

    Raises:
        ValueError: nothing, as where the architecture alone was asked for.
    """
    plain = config.additional_config.get(STEERING)
    if plain is None:
        raise ValueError(
            f"{ARCHITECTURE} is two models: name the second one with --dlm-steer-base "
            "(dlm_steer_base of LLM), not by hf_overrides"
        )
    return Steering(**plain)


# -- configurations --------------------------------------------------------


def base_model_config(
    tuned: ModelConfig,
    base: str,
    quantization: str | None,
    max_model_len: int | None = None,
) -> ModelConfig:
    """The base's configuration: what it does not say itself is the tuned model's.

    Args:
        tuned: the tuned model's, or the engine's.
        base: folder or hub id.
        quantization: as it was asked for; without, what the checkpoint says.
        max_model_len: the engine's; without, what the base was made for.
    """
    overrides = {k: v for k, v in tuned.hf_overrides.items() if k != "architectures"}
    return ModelConfig(
        model=base,
        tokenizer=base,
        tokenizer_mode=tuned.tokenizer_mode,
        trust_remote_code=tuned.trust_remote_code,
        dtype=tuned.dtype,
        seed=tuned.seed,
        max_model_len=max_model_len,
        quantization=quantization,
        enforce_eager=tuned.enforce_eager,
        hf_overrides=overrides,
        config_format=tuned.config_format,
    )


def tuned_config(config: VllmConfig) -> VllmConfig:
    """The engine's configuration, for the tuned model in it."""
    names = steering_of(config).architectures
    own = config.with_hf_config(config.model_config.hf_config, architectures=names)
    quant = copy.deepcopy(own.quant_config)
    return replace(own, quant_config=_below("tuned", quant))


def base_config(config: VllmConfig) -> VllmConfig:
    """The engine's configuration, for the base in it."""
    steering, tuned = steering_of(config), config.model_config
    model = base_model_config(
        tuned, steering.base, steering.quantization, tuned.max_model_len
    )
    # What vLLM calls a configuration of a part of a model: the whole is checked.
    model.is_submodel_config = True
    quant = VllmConfig.get_quantization_config(model, config.load_config)
    return replace(config, model_config=model, quant_config=_below("base", quant))


def _below(prefix: str, quant_config: Any) -> Any:
    """A quantization that names layers as they are called here, below a prefix."""
    from vllm.model_executor.models.utils import WeightsMapper

    if quant_config is not None:
        mapper = WeightsMapper(orig_to_new_prefix={"": f"{prefix}."})
        quant_config.apply_vllm_mapper(mapper)
    return quant_config


# -- what fits together ----------------------------------------------------


def check_models(tuned: ModelConfig, base: ModelConfig) -> None:
    """Refuse two models that cannot be steered.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    for role, model in (("tuned model", tuned), ("base", base)):
        _check_kind(f"the {role} {model.model!r}", model)
    if tuned.get_vocab_size() != base.get_vocab_size():
        raise ValueError(
            f"{tuned.model!r} has logits of {tuned.get_vocab_size()} tokens and its "
            f"base {base.model!r} of {base.get_vocab_size()}: save the base with "
            "embeddings of the tuned model's size (resize_token_embeddings)"
        )
    if (tuned.use_mla, tuned.get_sliding_window()) != (
        base.use_mla,
        base.get_sliding_window(),
    ):
        raise ValueError(
            f"{tuned.model!r} and its base {base.model!r} differ in how they keep keys "
            "(latent attention, sliding window): take the model that was tuned"
        )
    if base.quantization and base.hf_text_config.tie_word_embeddings:
        raise ValueError(
            f"the base {base.model!r} is quantized ({base.quantization}) and shares "
            "its embedding with its head, which cannot be loaded as a second model: "
            "take the checkpoint that is not quantized"
        )
    if not tuned.skip_tokenizer_init:
        _check_tokenizers(tuned, base)


def _check_kind(name: str, model: ModelConfig) -> None:
    why = None
    if model.is_diffusion or model.runner_type != "generate":
        why = "does not write token by token"
    elif model.is_multimodal_model or model.is_encoder_decoder or model.uses_mrope:
        why = "does not read text alone"
    elif model.is_hybrid or model.is_attention_free or model.has_inner_state:
        why = "keeps a state other than keys and values"
    elif model.using_transformers_backend():
        why = "has no network in vLLM itself"
    elif hooks := [each for each in model.architectures if each in MODELS_CONFIG_MAP]:
        why = f"needs engine settings of its own in vLLM ({hooks[0]})"
    if why:
        raise ValueError(
            f"{name} {why}: steering is for two autoregressive models of text with "
            "attention throughout. Serve it without --dlm-steer-base"
        )


def _check_tokenizers(tuned: ModelConfig, base: ModelConfig) -> None:
    from vllm.tokenizers import cached_tokenizer_from_config

    ours, theirs = (
        cached_tokenizer_from_config(each).get_vocab() for each in (tuned, base)
    )
    refuse_other_tokens(tuned.model, ours, base.model, theirs)
