# SPDX-License-Identifier: Apache-2.0
"""Presets: values of a strategy's parameters that were published together.

A strategy declares them as data, `Params.presets`. Whoever sets parameters may name one
as `preset`: it gives a value to each parameter that is not set beside it. `default`
stands for the defaults of the parameters, of every strategy that has presets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dlm.messages import quote

PRESET = "preset"
"""What names a preset among a strategy's parameters."""

DEFAULT = "default"
"""The preset that changes nothing."""


@dataclass(frozen=True)
class Preset:
    """Values that belong together."""

    values: Mapping[str, Any]
    """Parameter -> value; all others keep their defaults."""
    source: str
    """Where they are published."""
    beside: str = ""
    """Options of the request that they were published with, in words. A preset does
    not set them."""


def named(presets: Mapping[str, Preset], name: object) -> Mapping[str, Any]:
    """The values of a preset.

    Args:
        presets: those of a strategy.
        name: as somebody has set it.

    Raises:
        ValueError: there is none by that name; the message lists those that are.
    """
    if name == DEFAULT:
        return {}
    if not isinstance(name, str) or name not in presets:
        known = ", ".join((DEFAULT, *presets))
        raise ValueError(f"unknown preset {quote(name)}; choose one of: {known}")
    return presets[name].values


def filled(presets: Mapping[str, Preset], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that were set, with those of the preset that they name, if any.

    Raises:
        ValueError: as `named`.
    """
    values = dict(given)
    name = values.pop(PRESET, None)
    return values if name is None else {**named(presets, name), **values}
