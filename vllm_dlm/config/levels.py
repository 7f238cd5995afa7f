# SPDX-License-Identifier: Apache-2.0
"""How what one level sets stands over what the levels below it set.

From the top: a request, the server's flags, the options in the model's folder, the
model's family. A folder's options are `dlm_options` in its config.json: any options of
a request, by their names. A training writes the decoding there that it was made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_dlm.config.cache import POLICIES
from vllm_dlm.config.growth import GROWTHS
from vllm_dlm.config.options import (
    REQUEST_OPTIONS,
    DlmConfig,
    is_server_only,
    parse_options,
    parse_params,
)
from vllm_dlm.config.validation import parse_policy
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.presets import PRESET

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FIELD = "dlm_options"
"""Of a folder's config.json."""


def config_entries(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says whose model is decoded with these options by default.

    Args:
        options: of a request, such as {"strategy": "entropy", "strategy_config":
            {"threshold": 0.5}}; none leaves config.json as it is.

    Raises:
        ValueError: as `folder_options`.
    """
    _parsed(options, "the options for the model's folder")
    return {FIELD: dict(options)} if options else {}


def folder_options(hf_config: PretrainedConfig) -> DlmConfig:
    """The options that a model's folder sets.

    Raises:
        ValueError: unknown names, wrong types, values out of range, options that only
            a server may set; the message says what is valid.
    """
    name = getattr(hf_config, "name_or_path", "") or "the model"
    options = getattr(hf_config, FIELD, None) or {}
    return _parsed(options, f"{FIELD} in config.json of {name}")


def over_folder(server: DlmConfig, folder: DlmConfig) -> DlmConfig:
    """A server's options, and behind what it leaves open those of the model's folder.

    Parameters count only for the strategy or policy that they were set for, and one
    step schedule stands in place of another. So of a folder whose strategy the server
    does not use, blocks and schedule do not count either.
    """
    given = _set(server)
    levels = _set(folder)
    if given.get("strategy", levels.get("strategy")) != levels.get("strategy"):
        for name in ("block_length", "sub_block_length", "steps", "steps_per_block"):
            levels.pop(name, None)
    if {"steps", "steps_per_block"} & given.keys():
        levels.pop("steps", None)
        levels.pop("steps_per_block", None)
    for option in ("strategy", "cache", "growth"):
        config = f"{option}_config"
        if option in given and given[option] != levels.get(option):
            levels.pop(config, None)
        below = levels.get(config, {})
        if config in given and option == "strategy" and "strategy" in levels:
            levels[config] = over(levels["strategy"], below, given[config])
        elif config in given:
            levels[config] = {**below, **given[config]}
    return server.model_copy(
        update={
            name: value
            for name, value in levels.items()
            if name not in given or name.endswith("_config")
        }
    )


def over(
    strategy: str, below: Mapping[str, Any], level: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameters of one level over those of the levels below.

    A level that names a preset means what that stands for: of what lies below, only
    what no request can set is left.
    """
    kind = STRATEGIES[strategy].Params
    if kind.presets and level.get(PRESET) is not None:
        fields = kind.model_fields
        below = {
            name: value
            for name, value in below.items()
            if name in fields and is_server_only(fields[name])
        }
    return {**below, **level}


def _set(config: DlmConfig) -> dict[str, Any]:
    """What a configuration sets: option -> value."""
    names = config.model_fields_set
    found = {name: getattr(config, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _parsed(options: Mapping[str, Any], where: str) -> DlmConfig:
    config = parse_options(options, where=where, valid=REQUEST_OPTIONS)
    if config.strategy is not None:
        parse_params(config.strategy, config.strategy_config, where=where)
    elif config.strategy_config:
        raise ValueError(f"{where}: strategy_config needs a strategy beside it")
    parse_policy("cache", POLICIES, config.cache, config.cache_config, where=where)
    parse_policy("growth", GROWTHS, config.growth, config.growth_config, where=where)
    return config
