# SPDX-License-Identifier: Apache-2.0
"""What holds for the parameters of every registered strategy, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import SERVER_PARAMETER, DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.messages import values_of
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Strategy, numeric_fields

FULL_ATTENTION = ModelDefaults("threshold", 32, mask_token_id=5)
BLOCK_CAUSAL = ModelDefaults("threshold", 8, 5, attention="block")
OURS = [name for name in STRATEGIES if STRATEGIES[name].__module__.startswith("vllm_")]


def parameters() -> Iterator[tuple[str, str]]:
    for name in OURS:
        for parameter in STRATEGIES[name].Params.model_fields:
            yield name, parameter


def field_of(name: str, parameter: str) -> Any:
    return STRATEGIES[name].Params.model_fields[parameter]


def refuse(name: str, parameter: str, value: Any) -> str:
    """The message with which a request for a strategy is refused."""
    options = {"strategy": name, "strategy_config": {parameter: value}}
    with pytest.raises(ValueError) as refusal:
        resolve(DlmConfig(), {"dlm": options}, FULL_ATTENTION)
    return str(refusal.value)


def limits(field: Any) -> Iterator[tuple[float, float]]:
    """(limit, a value just outside it) of a numeric field."""
    for constraint in field.metadata:
        for attribute, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
            limit = getattr(constraint, attribute, None)
            if limit is not None:
                yield limit, limit + step


@pytest.mark.parametrize("name", OURS)
def test_declares_itself(name: str):
    strategy: type[Strategy] = STRATEGIES[name]
    assert strategy.name == name
    assert strategy.paper and strategy.summary
    assert len(strategy.summary) < 90
    for parameter, field in strategy.Params.model_fields.items():
        assert field.description, parameter
        assert values_of(field), parameter


@pytest.mark.parametrize(("name", "parameter"), list(parameters()))
def test_refuses_what_is_out_of_range(name: str, parameter: str):
    field = field_of(name, parameter)
    if field.json_schema_extra == SERVER_PARAMETER:
        assert "set by the server" in refuse(name, parameter, "any")
        return
    if parameter in numeric_fields(STRATEGIES[name].Params):
        bounds = list(limits(field))
        sides = {limit > outside or limit < outside for limit, outside in bounds}
        assert sides, f"{parameter} has no bounds"
        for limit, outside in bounds:
            message = refuse(name, parameter, outside)
            assert parameter in message
            shown = int(limit) if limit == int(limit) else limit
            assert str(shown) in message
        for wrong in ("many", True, [1], math.nan, math.inf):
            assert parameter in refuse(name, parameter, wrong)
    elif field.annotation is not bool and get_args(field.annotation):
        message = refuse(name, parameter, "nonsense")
        assert parameter in message
        for choice in get_args(field.annotation):
            if isinstance(choice, str):
                assert repr(choice) in message


@pytest.mark.parametrize("name", OURS)
def test_names_its_parameters_to_who_mistypes_one(name: str):
    message = refuse(name, "no_such_parameter", 1)
    assert "no_such_parameter" in message
    for parameter in STRATEGIES[name].Params.model_fields:
        assert parameter in message


@pytest.mark.parametrize("name", OURS)
def test_what_needs_the_whole_canvas_is_not_for_block_causal_models(name: str):
    request = {"dlm_strategy": name}
    if STRATEGIES[name].scope == "block":
        return
    assert resolve(DlmConfig(), request, FULL_ATTENTION).block_length == 0
    asked = resolve(DlmConfig(), request | {"dlm_block_length": 16}, FULL_ATTENTION)
    assert asked.block_length == 16
    with pytest.raises(ValueError, match="needs full attention") as refusal:
        resolve(DlmConfig(), request, BLOCK_CAUSAL)
    assert "threshold" in str(refusal.value)
    assert repr(name) in str(refusal.value)


def test_the_servers_block_length_is_for_its_own_strategy():
    canvas = [name for name in OURS if STRATEGIES[name].scope == "canvas"]
    assert canvas
    for name in canvas:
        other = DlmConfig(strategy="threshold", block_length=16)
        own = DlmConfig(strategy=name, block_length=64)
        request = {"dlm_strategy": name}
        assert resolve(other, request, FULL_ATTENTION).block_length == 0
        assert resolve(own, request, FULL_ATTENTION).block_length == 64
