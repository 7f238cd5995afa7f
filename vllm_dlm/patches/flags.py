# SPDX-License-Identifier: Apache-2.0
"""Flags of ours, model aliases, and what an engine's arguments must say."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission import body_guard
from vllm_dlm.admission.sampling_params import is_ours
from vllm_dlm.config import aliases
from vllm_dlm.entrypoints.flags import (
    add_engine_arguments,
    prepared,
    with_negative_numbers,
)
from vllm_dlm.entrypoints.wings import wings
from vllm_dlm.patches.ledger import Where, patch
from vllm_dlm.patches.themes import apply_front_end_patches, apply_plugin_patches

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

_ARGUMENTS = "docs/upstream.md#a-plugin-cannot-register-engine-arguments"
_NAMES = "docs/upstream.md#a-plugin-cannot-resolve-model-names"
_WHEN_ARGUMENTS = "general plugins may add engine arguments"

_SERVER_MODULE = "vllm.entrypoints.serve.utils.api_utils"
_LATER_MODULES = ("vllm.v1.engine.async_llm", "vllm.entrypoints.serve.engine.serving")
"""Those that entries of `Where.SERVER` are about, and that a server imports last."""


@patch(
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    why="A plugin has no seam for flags of its own.",
    upstream=_ARGUMENTS,
    drop_when=_WHEN_ARGUMENTS,
)
def add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument group DlmConfig to the parser."""

    def add(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        return add_engine_arguments(original(parser))

    return add


@patch(
    "vllm.engine.arg_utils:EngineArgs.from_cli_args",
    why="vLLM drops arguments that are not fields of EngineArgs.",
    upstream=_ARGUMENTS,
    drop_when=_WHEN_ARGUMENTS,
)
def from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Folds --dlm-* into additional_config["dlm"] and resolves model aliases; clients
    keep asking for the name that was typed. Puts our BodyGuard into --middleware."""

    def build(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        # An HTTP server builds its application of the same arguments, later.
        middleware = getattr(args, "middleware", None)
        if isinstance(middleware, list) and body_guard.MIDDLEWARE not in middleware:
            args.middleware = [*middleware, body_guard.MIDDLEWARE]
        return original(cls, prepared(args))

    return build


@patch(
    "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args",
    why=(
        "-1.2 behind a flag is taken for an option with a part: what follows is its "
        "value, and if nothing does, parsing ends with an IndexError."
    ),
    upstream="docs/upstream.md#a-negative-number-is-taken-for-an-option",
    drop_when="vLLM's parser tells -1.2 from -O.level",
    mends_vllm=True,
)
def parse_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reads `--dlm-steer-mu -1.2` as `--dlm-steer-mu=-1.2`; of our flags alone."""

    def parse(
        self: FlexibleArgumentParser,
        args: list[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> Any:
        given = sys.argv[1:] if args is None else args
        return original(self, with_negative_numbers(given), namespace)

    return parse


@patch(
    "vllm.entrypoints.cli.serve:ServeSubcommand.validate",
    why="A wrong option would end `vllm serve` in a traceback, minutes later.",
    upstream=_ARGUMENTS,
    drop_when=_WHEN_ARGUMENTS,
    where=Where.SERVER,
)
def validate_serve(original: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the dlm options and the model alias before anything starts."""

    def validate(self: ServeSubcommand, args: argparse.Namespace) -> None:
        try:
            copy = prepared(args)
        except ValueError as error:
            # As argparse ends: one line, no traceback.
            print(f"vllm {self.name}: error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        # API server processes get these arguments and load plugins only after they
        # have read them.
        args.additional_config = copy.additional_config
        original(self, args)

    return validate


@patch(
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    why=(
        "Offline use builds EngineArgs before plugins are loaded: this is the first "
        "method after it."
    ),
    upstream=_NAMES,
    drop_when="vLLM has a hook for model names or engine arguments",
)
def create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resolves the model alias, validates the dlm options, and refuses them for models
    that are not ours."""

    def create(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        from vllm_dlm.config.options import DlmConfig

        typed = self.model
        self.model = aliases.resolve(typed, self.revision, self.hf_token)
        if self.model != typed and self.served_model_name is None:
            self.served_model_name = [typed]
        if self.tokenizer is not None:
            self.tokenizer = aliases.resolve(self.tokenizer, self.tokenizer_revision)
        additional = self.additional_config
        options = additional.get("dlm") if isinstance(additional, Mapping) else None
        if options is not None:
            DlmConfig.from_mapping(options, where='additional_config["dlm"]')
        if (options or {}).get("diffusion_gemma") == "engine":
            self.hf_overrides = _for_our_engine(self.hf_overrides)
        asked = [wing for wing in wings() if wing.translate(self)]
        config = original(self, *args, **kwargs)
        for wing in asked:
            wing.check(config)
        ours = is_ours(config.model_config.hf_config)
        _refuse_options(options or {}, config.model_config.hf_config, typed)
        body_guard.process["ours"] = ours
        apply_front_end_patches(ours)
        if _SERVER_MODULE in sys.modules:
            # Requests of a server are checked when they come, for models of vLLM's
            # own too.
            for module in _LATER_MODULES:
                importlib.import_module(module)
            apply_plugin_patches()
        return config

    return create


def _for_our_engine(overrides: Any) -> Callable[[PretrainedConfig], PretrainedConfig]:
    """`--hf-overrides` that have our engine serve DiffusionGemma.

    Args:
        overrides: the user's.

    Raises:
        ValueError: they are a function.
    """
    from vllm_dlm.model_executor.models.diffusion_gemma_config import (
        served_by_our_engine,
    )

    if isinstance(overrides, functools.partial):
        # Made ready before.
        return overrides
    if callable(overrides):
        raise ValueError(
            "hf_overrides must be a mapping with diffusion_gemma 'engine', not a "
            "function"
        )
    return functools.partial(served_by_our_engine, overrides=dict(overrides or {}))


def _refuse_options(
    options: Mapping[str, Any], hf_config: PretrainedConfig, typed: str
) -> None:
    """Refuse options of ours that nobody would read.

    Args:
        typed: the model's name, as the user gave it.

    Raises:
        ValueError: it says whose options they are.
    """
    gemmas = ("diffusion_gemma", "diffusion_gemma_text")
    if "diffusion_gemma" in options and hf_config.model_type not in gemmas:
        raise ValueError(
            "the dlm option diffusion_gemma is for DiffusionGemma alone, and "
            f"{typed!r} is another model; leave it out"
        )
    unread = [name for name in options if name != "diffusion_gemma"]
    if unread and not is_ours(hf_config):
        raise ValueError(
            f"the dlm options ({', '.join(unread)}) are for diffusion language "
            f"models that vllm-dlm serves, and {typed!r} is not one; "
            "`vllm-dlm models` lists them"
        )


@patch(
    "vllm.engine.arg_utils:get_model_path",
    why=(
        "With HF_HUB_OFFLINE, EngineArgs looks its model up when it is built, so that "
        '`vllm.LLM("llada-tiny")` would ask for a checkpoint of that name.'
    ),
    upstream=_NAMES,
    drop_when="vLLM has a hook for model names",
)
def get_model_path(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resolves the model alias first."""

    def resolve(model: Any, revision: str | None = None) -> Any:
        if isinstance(model, str):
            model = aliases.resolve(model, revision)
        return original(model, revision)

    return resolve
