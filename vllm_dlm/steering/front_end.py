# SPDX-License-Identifier: Apache-2.0
"""From a user's options to an engine of two models; refusals before weights are read.

The core finds this module by its name (`entrypoints/wings.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_dlm.config import aliases
from vllm_dlm.config.engine_keys import SPECULATION, STEERING
from vllm_dlm.messages import quote
from vllm_dlm.steering.options import SteerConfig, Steering, parse, resolve

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams

logger = init_logger(__name__)

REQUEST_KEYS: dict[str, str] = {}
"""See `entrypoints/wings.py`, as for all below."""

OPTIONS = SteerConfig
OPTIONS_KEY = STEERING

DRAFTS = ("ngram", "ngram_gpu", "suffix", "draft_model")
"""Speculation of vLLM's own that does not look at hidden states."""

FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "pt", "npcache", "dummy")
"""Values of `--load-format` whose loader reads a second checkpoint, or none."""


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse options that are not valid or not complete, and files without a constant.

    Raises:
        ValueError: it says what is wrong.
    """
    additional = getattr(args, "additional_config", None)
    if isinstance(additional, Mapping) and STEERING in additional:
        resolve(parse(additional[STEERING]))


def translate(args: EngineArgs) -> bool:
    """Adapt an engine's arguments in place; whether they ask for steering.

    Raises:
        ValueError: an option is not valid, or does not go with steering; or the two
            models do not fit together.
    """
    additional = args.additional_config
    if not isinstance(additional, Mapping) or STEERING not in additional:
        return False
    given = additional[STEERING]
    if isinstance(given, Mapping) and "architectures" in given:
        return True  # these arguments were translated before
    config = parse(given)
    if config.steer_base is None:
        return False
    from vllm_dlm.steering.pair import (
        ARCHITECTURE,
        base_model_config,
        check_models,
    )

    mu, keep = resolve(config)
    _refuse(args)
    base = aliases.resolve(config.steer_base, None, args.hf_token)
    tuned = args.create_model_config()
    check_models(tuned, base_model_config(tuned, base, args.quantization))
    steering = Steering(
        base=base,
        mu=mu,
        keep=keep,
        architectures=tuned.architectures,
        quantization=args.quantization,
    )
    args.additional_config = {**additional, STEERING: steering.model_dump()}
    args.hf_overrides = {**args.hf_overrides, "architectures": [ARCHITECTURE]}
    logger.info(
        "Steered decoding (SVDecode, arXiv 2509.15888): %s, steered by its base %s "
        "with mu %g, tokens below %g of the best probability left out. Every token is "
        "computed by both models.",
        args.model,
        base,
        mu,
        keep,
    )
    return True


def _refuse(args: EngineArgs) -> None:
    why = None
    if args.pipeline_parallel_size > 1:
        why = "does not support pipeline parallelism: use --tensor-parallel-size"
    elif args.enable_lora:
        why = (
            "does not load adapters, which would change both models: merge the adapter "
            "into its base (peft's merge_and_unload) and serve the result"
        )
    elif args.enable_prompt_embeds:
        why = "reads tokens, not embeddings of one model: leave out prompt embeddings"
    elif callable(args.hf_overrides):
        why = "needs hf_overrides as a dict, which is put upon both models"
    elif args.load_format not in FORMATS:
        why = (
            f"cannot read a second model with load_format {quote(args.load_format)}: "
            f"use one of {', '.join(FORMATS)}"
        )
    elif SPECULATION in args.additional_config:
        why = (
            "does not go with our speculative methods, which look into the model that "
            f"they draft for: use one of vLLM's ({', '.join(DRAFTS)})"
        )
    if why:
        raise ValueError(f"steering (dlm_steer_base) {why}")


def check(config: VllmConfig) -> None:
    """Refuse a finished configuration that the base does not fit.

    Raises:
        ValueError: a drafter that needs hidden states; a context or a tensor
            parallelism that the base was not made for.
    """
    from vllm_dlm.steering.pair import base_model_config, steering_of

    speculative = config.speculative_config
    if speculative is not None and speculative.method not in DRAFTS:
        raise ValueError(
            f"steering (dlm_steer_base) does not go with speculative method "
            f"{speculative.method!r}, which drafts from one model's hidden states: use "
            f"one of {', '.join(DRAFTS)}"
        )
    steering, tuned = steering_of(config), config.model_config
    base = base_model_config(tuned, steering.base, steering.quantization)
    if base.max_model_len < tuned.max_model_len:
        raise ValueError(
            f"the base {steering.base!r} reads {base.max_model_len} tokens, and the "
            f"engine {tuned.max_model_len}: set --max-model-len {base.max_model_len}"
        )
    try:
        base.verify_with_parallel_config(config.parallel_config)
    except ValueError as error:
        raise ValueError(f"the base {steering.base!r}: {error}") from None


def check_request(params: SamplingParams, config: VllmConfig) -> None:
    """Nothing: what vLLM honours of a request, it honours here."""
