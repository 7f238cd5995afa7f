# SPDX-License-Identifier: Apache-2.0
"""Names that other servers and the models' own scripts have for our options."""

from __future__ import annotations

import re

PREFIX = "dlm_"
"""With it begins each key of a request's options (`dlm_strategy`, `dlm_threshold`)."""

_STEPS = "dlm_steps"
_BLOCK = "dlm_block_length"
_SUB_BLOCK = "dlm_sub_block_length"
_STRATEGY = "dlm_strategy"
_CACHE = "dlm_cache"
_THRESHOLD = "dlm_threshold"
_LENGTH = "max_tokens"
_GUIDANCE = "classifier-free guidance is not supported"
_GRAMMAR = "use the fields structured_outputs or response_format"
_MASK = "the mask token is the model's own"

FOREIGN: dict[str, str] = {
    **dict.fromkeys(
        ("gen_length", "gen_len", "generation_length", "max_gen_length")
        + ("max_gen_toks", "max_new_tokens", "answer_length", "canvas_length"),
        _LENGTH,
    ),
    **dict.fromkeys(
        ("block_size", "block_len", "blocksize", "bd_size", "gen_block_size")
        + ("gen_block_length", "decoding_block_size", "diffusion_block_length"),
        _BLOCK,
    ),
    **dict.fromkeys(
        ("small_block_size", "sub_block_size", "small_block_length", "subblock_size"),
        _SUB_BLOCK,
    ),
    **dict.fromkeys(
        ("num_steps", "n_steps", "max_steps", "total_steps")
        + ("denoise_steps", "denoising_steps")
        + ("num_denoise_steps", "num_denoising_steps", "diffusion_steps")
        + ("num_diffusion_steps", "max_diffusion_steps", "sampling_steps")
        + ("num_sampling_steps", "generation_steps", "gen_steps", "unmasking_steps")
        + ("inference_steps", "num_inference_steps", "timesteps", "num_timesteps"),
        _STEPS,
    ),
    **dict.fromkeys(
        ("block_steps", "num_block_steps", "num_steps_per_block")
        + ("denoising_steps_per_block", "denoise_steps_per_block"),
        "dlm_steps_per_block",
    ),
    **dict.fromkeys(
        ("remasking", "remasking_strategy", "remask_strategy", "unmasking")
        + ("unmasking_strategy", "unmask_strategy", "denoising_strategy")
        + ("decoding_strategy", "decode_strategy", "decoding_algorithm")
        + ("sampling_strategy", "sampling_algorithm", "transfer_strategy")
        + ("decoding_method", "unmasking_method", "algorithm"),
        _STRATEGY,
    ),
    **dict.fromkeys(
        ("algorithm_config", "strategy_params", "strategy_kwargs", "strategy_args"),
        "dlm_strategy_config",
    ),
    **dict.fromkeys(
        ("confidence_threshold", "conf_threshold", "dynamic_threshold")
        + ("denoising_threshold", "unmasking_threshold", "decoding_threshold")
        + ("parallel_threshold", "prob_threshold", "probability_threshold")
        + ("transfer_threshold", "acceptance_threshold", "remasking_threshold"),
        _THRESHOLD,
    ),
    "editing_threshold": "dlm_edit_threshold",
    "algorithm_temperature": "dlm_alg_temp",
    **dict.fromkeys(
        ("use_cache", "cache_type", "cache_policy", "cache_mode", "kv_cache_policy")
        + ("dual_cache", "use_dual_cache", "use_prefix_cache", "prefix_kv_cache")
        + ("dkv_cache", "use_kv_cache", "use_block_cache"),
        _CACHE,
    ),
    **dict.fromkeys(
        ("eos_early_stop", "early_stop", "eos_early_exit", "use_eotp"), "dlm_eotp"
    ),
    **dict.fromkeys(
        ("cfg", "cfg_scale", "guidance_scale", "unsupervised_cfg_scale"), _GUIDANCE
    ),
    **dict.fromkeys(("mask_id", "mask_token", "mask_token_id"), _MASK),
    **dict.fromkeys(
        ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        + ("guided_decoding_backend", "guided_whitespace_pattern"),
        _GRAMMAR,
    ),
}
"""Name in other servers and scripts -> the field or option that means the same here, or
a clause that says why there is none."""

OTHERS_PREFIXES = ("diffusion_", "dllm_", "dlm_", "ddlm_", "mdlm_")
"""Prefixes of other servers' options."""


def plain(key: str) -> str:
    """A key spelt as our options are: `dlm_block_length` for `dlm-blockLength`."""
    key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return re.sub(r"[^0-9a-z]+", "_", key.lower()).strip("_")


def advice(name: str) -> str | None:
    """What means the same here as an option of another server; None if none is known.

    Args:
        name: the option, as `plain` spells it, with or without a prefix.
    """
    for prefix in ("", *OTHERS_PREFIXES):
        if name.startswith(prefix) and (found := FOREIGN.get(name[len(prefix) :])):
            return found
    return None


def clause(meaning: str) -> str:
    """`advice`, as the end of a sentence."""
    return meaning if " " in meaning else f"use {meaning!r}"
