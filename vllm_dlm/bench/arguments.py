# SPDX-License-Identifier: Apache-2.0
"""Arguments that commands which measure share, and types of arguments."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vllm_dlm.bench.engine import load_adapter
from vllm_dlm.cli.arguments import count
from vllm_dlm.config.cache import POLICIES
from vllm_dlm.config.options import DlmConfig, parse_params
from vllm_dlm.config.validation import parse_policy
from vllm_dlm.strategies import STRATEGIES

Setting: TypeAlias = tuple[str, dict[str, Any]]
"""A strategy or a cache policy, and its parameters."""

DTYPES = ("float32", "bfloat16")
BUILT_IN = ("plain", "ar", "native")
AGAINST = (*BUILT_IN, "adapter:FILE.py:Class")


def add_settings(group: argparse._ArgumentGroup) -> None:
    """Add the strategies and cache policies of the cells."""
    group.add_argument(
        "--strategies",
        type=settings_of(strategy),
        default="threshold",
        metavar="NAME,...",
        help="a strategy may have parameters, as in threshold:threshold=0.8 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--caches",
        type=settings_of(cache),
        default="none",
        metavar="NAME,...",
        help=f"of {', '.join(POLICIES)}; parameters as above (default: %(default)s)",
    )


def add_engine_options(
    group: argparse._ArgumentGroup, *, server: str, engine: str
) -> None:
    """Add options for the engines.

    Args:
        server: examples of the server's options, for the help.
        engine: whose the options of vLLM are, and an example, for the help.
    """
    group.add_argument(
        "--server-option",
        type=server_option,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help=f"an option of this package's server: {server}",
    )
    group.add_argument(
        "--engine-option",
        type=json_option,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help=f"an argument of vLLM's engine{engine}",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the files that a run writes."""
    output = parser.add_argument_group("what is written")
    output.add_argument(
        "--json", type=Path, metavar="FILE", help="all numbers, after each cell"
    )
    output.add_argument(
        "--resume", action="store_true", help="skip the cells that FILE has"
    )
    output.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="a picture (.png, .svg, .pdf); needs the extra `bench`",
    )


def counts(text: str) -> list[int]:
    """Whole numbers from 1, with commas between."""
    return [count(part) for part in text.split(",")]


def dtypes(text: str) -> list[str]:
    """Names of `DTYPES`, with commas between."""
    for part in text.split(","):
        if part not in DTYPES:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not one of {', '.join(DTYPES)}"
            )
    return text.split(",")


def strategy(name: str, params: Mapping[str, Any], where: str) -> None:
    """Check a strategy and its parameters, for `settings_of`."""
    STRATEGIES.check(name)
    parse_params(name, params, where=where)


def cache(name: str, params: Mapping[str, Any], where: str) -> None:
    """Check a cache policy and its parameters, for `settings_of`."""
    if name not in POLICIES:
        raise ValueError(f"{name!r} is not one of {', '.join(POLICIES)}")
    parse_policy("cache", POLICIES, name, params, where=where)


def settings_of(
    check: Callable[[str, Mapping[str, Any], str], None],
) -> Callable[[str], list[Setting]]:
    """A parser of `NAME:PARAMETER=VALUE:...,NAME`: names and parameters, checked."""

    def parse(text: str) -> list[Setting]:
        found = []
        for part in text.split(","):
            name, *settings = part.split(":")
            params = dict(map(json_option, settings))
            try:
                check(name, params, repr(part))
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None
            found.append((name, params))
        return found

    return parse


def server_option(text: str) -> tuple[str, Any]:
    """NAME=JSON, an option of this package's server."""
    name, value = json_option(text)
    try:
        DlmConfig.from_mapping({name: value}, where="--server-option")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, value


def against(text: str) -> list[str]:
    """Names of `AGAINST`, with commas between."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name in BUILT_IN:
            continue
        kind, _, spec = name.partition(":")
        if kind != "adapter":
            raise argparse.ArgumentTypeError(
                f"{name!r} is not one of {', '.join(AGAINST)}"
            )
        try:
            load_adapter(spec)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def text_option(text: str) -> tuple[str, str]:
    """NAME=TEXT."""
    name, is_there, value = text.partition("=")
    if not name or not is_there:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return name, value


def json_option(text: str) -> tuple[str, Any]:
    """NAME=JSON; what is no JSON is a text."""
    name, value = text_option(text)
    return name, _json_or_text(value)


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
