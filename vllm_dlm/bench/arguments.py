# SPDX-License-Identifier: Apache-2.0
"""Types of the benchmark's arguments: strategies, cache policies, options as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
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
AGAINST = ("plain", "ar", "adapter:FILE.py:Class")


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
        if name in ("plain", "ar"):
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
