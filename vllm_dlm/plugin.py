# SPDX-License-Identifier: Apache-2.0
"""The general plugin: models, config classes, flags, aliases, request admission.

vLLM calls `register` in every process, possibly several times. A failed step is
logged and the rest goes on, so that an unfit vLLM keeps serving its own models;
`vllm-dlm doctor` lists what failed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

SUPPORTED_VLLM = ">=0.32,<0.34"
"""Accepted: what others are, a warning says. pyproject.toml requires the same."""

TESTED_VLLM = ("0.32.0", "0.33.0")
"""Versions that the tests were run on; how, docs/compatibility.md says. The last one
is what `make env` installs where a GPU answers."""

_MODELS = "vllm_dlm.model_executor.models"

ARCHITECTURES = {
    "LLaDAModelLM": f"{_MODELS}.llada:LLaDAModelLM",
    "LLaDAMoEModelLM": f"{_MODELS}.llada_moe:LLaDAMoEModelLM",
    "LLaDAMoEModel": f"{_MODELS}.llada_moe:LLaDAMoEModelLM",
    "LLaDA2MoeModelLM": f"{_MODELS}.llada2:LLaDA2MoeModelLM",
    "DreamModel": f"{_MODELS}.dream:DreamModel",
    "SDARForCausalLM": f"{_MODELS}.sdar:SDARForCausalLM",
    "SDARMoeForCausalLM": f"{_MODELS}.sdar:SDARMoeForCausalLM",
    "Fast_dLLM_QwenForCausalLM": f"{_MODELS}.fast_dllm:FastDLLMQwenForCausalLM",
    "A2DQwen3LMHeadModel": f"{_MODELS}.a2d:A2DQwen3LMHeadModel",
    "A2DQwen2LMHeadModel": f"{_MODELS}.a2d:A2DQwen2LMHeadModel",
    "A2DLlamaLMHeadModel": f"{_MODELS}.a2d:A2DLlamaLMHeadModel",
    "NemotronLabsDiffusionModel": f"{_MODELS}.nemotron:NemotronLabsDiffusionModel",
}
"""HF architecture -> model class."""

HF_CONFIGS = {
    "llada": f"{_MODELS}.llada_config:LLaDAConfig",
    # As dllm's trainer calls LLaDA-MoE, and dFactory's LLaDA2 with stacked experts.
    "lladamoe": f"{_MODELS}.llada_moe_config:LLaDAMoEConfig",
    "llada2_moe": f"{_MODELS}.llada2_config:LLaDA2MoeConfig",
    "llada2_moe_veomni": f"{_MODELS}.llada2_config:LLaDA2MoeConfig",
    "Dream": f"{_MODELS}.dream_config:DreamConfig",
    "sdar": f"{_MODELS}.sdar_config:SDARConfig",
    "sdar_moe": f"{_MODELS}.sdar_config:SDARMoeConfig",
    "Fast_dLLM_Qwen": f"{_MODELS}.fast_dllm_config:FastDLLMQwenConfig",
    "a2d-qwen3": f"{_MODELS}.a2d_config:A2DQwen3Config",
    "a2d-qwen2": f"{_MODELS}.a2d_config:A2DQwen2Config",
    "a2d-llama": f"{_MODELS}.a2d_config:A2DLlamaConfig",
    "nemotron_labs_diffusion": f"{_MODELS}.nemotron_config:NemotronLabsDiffusionConfig",
}
"""HF `model_type` -> config class, so that no checkpoint needs trust_remote_code."""

TOKENIZERS = {"Dream": f"{_MODELS}.dream_tokenizer:DreamTokenizer"}
"""HF `model_type` -> tokenizer class, where the checkpoint would bring its own code."""

CONFIG_HOOK = "vllm_dlm.model_executor.config_hook:DlmModelConfig"

problems: list[str] = []
"""What `register` could not do in this process."""

_registered = False


def is_disabled() -> bool:
    """Whether VLLM_DLM_DISABLE=1 makes the package a no-op."""
    return os.environ.get("VLLM_DLM_DISABLE") == "1"


def is_registered() -> bool:
    """Whether `register` has run in this process."""
    return _registered


def register() -> None:
    """Entry point of `vllm.general_plugins`; idempotent."""
    global _registered
    if _registered or is_disabled():
        return
    _registered = True

    from vllm.logger import init_logger

    share_logging()
    logger = init_logger(__name__)
    if message := version_problem():
        logger.warning("%s", message)
    steps: tuple[Callable[[], None], ...] = (
        _register_models,
        _register_hf_configs,
        _register_tokenizers,
        _register_config_hooks,
        _wrap_front_end,
    )
    for step in steps:
        try:
            step()
        except (ImportError, AttributeError, RuntimeError) as error:
            problems.append(f"{step.__name__.lstrip('_')}: {error}")
            logger.exception("vllm-dlm: %s", problems[-1])


def share_logging() -> None:
    """Log as vLLM does: its handlers and its level are for loggers below "vllm" only.

    They are set when an engine is configured, which may be later. Whoever has given
    "vllm_dlm" handlers of its own keeps them.
    """
    ours = logging.getLogger("vllm_dlm")
    if not ours.handlers:
        ours.parent = logging.getLogger("vllm")


def version_problem() -> str | None:
    """One sentence if the installed vLLM is outside the supported range."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version
    from vllm import __version__

    try:
        supported = SpecifierSet(SUPPORTED_VLLM).contains(
            Version(__version__).public, prereleases=True
        )
    except InvalidVersion:
        supported = False
    if supported:
        return None
    return (
        f"vllm-dlm supports vLLM {SUPPORTED_VLLM}, and {__version__} is installed: "
        "diffusion language models may fail in any way"
    )


def load(target: str) -> Any:
    """The class behind `module:name`."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _register_models() -> None:
    from vllm import ModelRegistry

    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)


def _register_hf_configs() -> None:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for model_type, target in HF_CONFIGS.items():
        # The registry looks strings up in a module of vLLM's own: a class it must be.
        _CONFIG_REGISTRY[model_type] = load(target)


def _register_tokenizers() -> None:
    from transformers import AutoTokenizer

    for model_type, target in TOKENIZERS.items():
        AutoTokenizer.register(
            load(HF_CONFIGS[model_type]), tokenizer_class=load(target), exist_ok=True
        )


def _register_config_hooks() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP[architecture] = load(CONFIG_HOOK)


def _wrap_front_end() -> None:
    from vllm_dlm.patches.front_end import apply_front_end_patches

    apply_front_end_patches()
