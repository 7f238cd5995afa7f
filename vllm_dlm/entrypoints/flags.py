# SPDX-License-Identifier: Apache-2.0
"""Our flags: --dlm-* of `vllm serve`, dlm_* of `LLM`, both into `additional_config`.

vLLM carries `additional_config` to every process of an engine; its "dlm" part holds the
server's options (`DlmConfig`), and options of wings lie beside it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_dlm.config import aliases
from vllm_dlm.entrypoints.wings import wings
from vllm_dlm.messages import explain, metavar_of

if TYPE_CHECKING:
    from pydantic import BaseModel
    from vllm.utils.argparse_utils import FlexibleArgumentParser

FLAG_PREFIX = "dlm_"


def option_classes() -> dict[str, type[BaseModel]]:
    """Key of `additional_config` -> the class whose fields are the options there."""
    from vllm_dlm.config.options import DlmConfig

    return {"dlm": DlmConfig} | {
        wing.OPTIONS_KEY: wing.OPTIONS for wing in wings() if wing.OPTIONS
    }


def add_engine_arguments(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
    """Add the argument group "DlmConfig", and the wings', to vLLM's parser; return it.

    A flag that is not given leaves no attribute behind, so that it overrides nothing.
    """
    for key, options in option_classes().items():
        text = options.__doc__
        if key == "dlm":
            text = (
                "Decoding of diffusion language models (vllm-dlm): the defaults of the "
                "server. A request may override all but the canvas limit and the "
                "learned filters, in `vllm_xargs` (HTTP) or "
                "`SamplingParams.extra_args`."
            )
        group = parser.add_argument_group(options.__name__, text)
        for name, field in options.model_fields.items():
            flag = f"--{FLAG_PREFIX}{name}".replace("_", "-")
            kind: dict[str, Any] = (
                {"action": argparse.BooleanOptionalAction}
                if field.annotation is bool
                else {"type": _checked(options, name), "metavar": metavar_of(field)}
            )
            text = (field.description or "").replace("%", "%%")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    return parser


def _checked(options: type[BaseModel], name: str) -> Callable[[str], Any]:
    """An argparse type: one option, validated as in any other source."""

    def parse(text: str) -> Any:
        from vllm_dlm.config.options import DlmConfig, parse_options

        try:
            if options is DlmConfig:
                return getattr(parse_options({name: text}, where=name), name)
            return getattr(options(**{name: text}), name)
        except ValidationError as error:
            message = explain(error)
        except ValueError as error:
            message = str(error).removeprefix(f"{name}: ")
        # argparse names the flag.
        raise argparse.ArgumentTypeError(message.removeprefix(f"{name}: "))

    return parse


_NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def with_negative_numbers(args: Sequence[str]) -> list[str]:
    """Arguments in which a number like -1.2 behind a flag of ours is joined to it."""
    joined: list[str] = []
    for arg in args:
        flag = joined[-1] if joined else ""
        is_ours = flag.startswith(("--dlm-", "--dlm_")) and "=" not in flag
        if is_ours and _NEGATIVE.fullmatch(arg):
            joined[-1] = f"{flag}={arg}"
        else:
            joined.append(arg)
    return joined


def fold_options(additional_config: Any, options: Mapping[str, Any]) -> Any:
    """`additional_config` with `options` (without prefix) put where they belong.

    Options win over what is there; a changed strategy or cache policy drops the other's
    parameters.

    Raises:
        ValueError: the merged options of "dlm" are not valid; a wing checks its own.
    """
    from vllm_dlm.config.options import DlmConfig

    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return additional_config
    if not isinstance(additional_config, Mapping | None):
        raise ValueError(
            "the dlm options need additional_config to be a dict, not "
            f"{type(additional_config).__name__}"
        )
    additional = dict(additional_config or {})
    for key, kind in option_classes().items():
        if key == "dlm":
            continue
        own = {name: given.pop(name) for name in kind.model_fields if name in given}
        if own:
            additional[key] = {**(additional.get(key) or {}), **own}
    if not given:
        return additional
    before = dict(additional.get("dlm") or {})
    if given.get("strategy", before.get("strategy")) != before.get("strategy"):
        before.pop("strategy_config", None)
    if given.get("cache", before.get("cache")) != before.get("cache"):
        before.pop("cache_config", None)
    merged = before | given
    DlmConfig.from_mapping(merged, where="dlm options")
    return {**additional, "dlm": merged}


def prepared(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of `vllm serve`'s arguments in terms that vLLM itself understands.

    Raises:
        ValueError: an option is not valid, or an alias stands for a model that cannot
            be had here.
    """
    copy = argparse.Namespace(**vars(args))
    options = {
        name.removeprefix(FLAG_PREFIX): value
        for name, value in vars(args).items()
        if name.startswith(FLAG_PREFIX)
    }
    copy.additional_config = fold_options(
        getattr(args, "additional_config", None) or {}, options
    )
    for wing in wings():
        wing.check_arguments(copy)
    typed = getattr(args, "model_tag", None) or getattr(args, "model", None)
    if typed in aliases.ALIASES:
        copy.model = aliases.resolve(
            typed, getattr(args, "revision", None), getattr(args, "hf_token", None)
        )
        if getattr(args, "served_model_name", None) is None:
            # Clients ask for the name that the server was started with.
            copy.served_model_name = [typed]
    return copy
