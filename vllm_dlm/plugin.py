# SPDX-License-Identifier: Apache-2.0
"""The general plugin: models, config classes, flags, aliases, request admission.

vLLM calls `register` in every process, possibly several times. A failed step is
logged and the rest goes on, so that an unfit vLLM keeps serving its own models;
`vllm-dlm doctor` lists what failed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from vllm_dlm.model_executor.models.tables import (
    ARCHITECTURES,
    AUTOREGRESSIVE,
    CONFIG_HOOK,
    HF_CONFIGS,
)
from vllm_dlm.registry import load

SUPPORTED_VLLM = ">=0.32,<0.34"
"""Accepted: what others are, a warning says. pyproject.toml requires the same."""

TESTED_VLLM = ("0.32.0", "0.33.0")
"""Versions that the tests were run on; how, docs/compatibility.md says. The last one
is what `make env` installs where a GPU answers."""

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
        _register_weight_transfer,
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


def _register_models() -> None:
    from vllm import ModelRegistry

    for architecture, target in (ARCHITECTURES | AUTOREGRESSIVE).items():
        ModelRegistry.register_model(architecture, target)


def _register_hf_configs() -> None:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for model_type, target in HF_CONFIGS.items():
        # The registry looks strings up in a module of vLLM's own: a class it must be.
        _CONFIG_REGISTRY[model_type] = load(target)


def _register_tokenizers() -> None:
    from vllm_dlm.model_executor.models.tokenizers import register_tokenizers

    register_tokenizers()


def _register_config_hooks() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP[architecture] = load(CONFIG_HOOK)


def _register_weight_transfer() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    # Of a name that nobody else has: it is known where this has run before.
    with contextlib.suppress(ValueError):
        WeightTransferEngineFactory.register_engine(
            "dlm_safetensors",
            "vllm_dlm.model_executor.weight_files",
            "FileWeightTransferEngine",
        )


def _wrap_front_end() -> None:
    from vllm_dlm.patches.themes import apply_plugin_patches

    apply_plugin_patches()
