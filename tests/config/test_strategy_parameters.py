# SPDX-License-Identifier: Apache-2.0
"""What holds for the parameters of every registered strategy, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import SERVER_PARAMETER, DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.messages import values_of
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Strategy, numeric_fields
from vllm_dlm.strategies.presets import DEFAULT

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


def params(server: dict[str, Any], request: dict[str, Any], **defaults: Any) -> Any:
    """What a request gets; `defaults` are the model's own parameters."""
    model = replace(FULL_ATTENTION, strategy="klass", strategy_config=defaults)
    return resolve(DlmConfig(**server), request, model).params


PRESETS = [
    (name, preset) for name in OURS for preset in STRATEGIES[name].Params.presets
]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_presets_are_what_they_say(name: str, preset: str):
    kind = STRATEGIES[name].Params
    declared = kind.presets[preset]
    assert preset != DEFAULT and preset.replace("_", "a").isalnum()
    assert declared.values and declared.source
    # Blocks to come are drafted where finished ones stay.
    model = BLOCK_CAUSAL if declared.values.get("eager") else FULL_ATTENTION
    for options in (
        {"dlm_strategy": name, "dlm_preset": preset},
        {"dlm": {"strategy": name, "strategy_config": {"preset": preset}}},
    ):
        chosen = resolve(DlmConfig(), options, model).params
        assert chosen == kind(**declared.values)
        assert chosen.model_fields_set == set(declared.values)
    # A server's default, and a request that goes back to the strategy's own.
    server = DlmConfig.from_mapping(
        {"strategy": name, "strategy_config": {"preset": preset}}, where="flags"
    )
    assert resolve(server, {}, model).params == kind(**declared.values)
    default = resolve(server, {"dlm_preset": DEFAULT}, model).params
    assert default == kind()


def test_seven_systems_have_the_values_of_their_papers():
    with_paper = {name for name, preset in PRESETS if preset == "paper"}
    assert with_paper >= {"cad", "hierarchy", "klass", "eb", "credit", "slowfast"}
    assert STRATEGIES["freedave"].Params.presets.keys() >= {"llada", "dream", "trado"}


def test_parameters_beside_a_preset_win_over_it():
    beside = {"dlm_preset": "llada_gsm8k", "dlm_threshold": 0.5}
    chosen = params({}, beside)
    assert (chosen.threshold, chosen.kl_threshold) == (0.5, 0.015)
    # The server's preset, and a request's parameter on top.
    server = {"strategy_config": {"preset": "llada_gsm8k"}}
    chosen = params(server, {"dlm_threshold": 0.5})
    assert (chosen.threshold, chosen.kl_threshold) == (0.5, 0.015)


def test_a_preset_means_the_same_whatever_the_server_has_set():
    kind = STRATEGIES["klass"].Params
    server = {"strategy_config": {"threshold": 0.1, "history": 7}}
    assert params(server, {"dlm_preset": "llada_mbpp"}) == kind(preset="llada_mbpp")
    assert params(server, {"dlm_preset": DEFAULT}, kl_threshold=3.0) == kind()
    own = {"strategy_config": {"preset": "llada_math"}}
    assert params(own, {}, history=5) == kind(preset="llada_math")
    # Only what no request can set is left.
    pc = DlmConfig(strategy="pc", strategy_config={"frequencies": "f", "most": 3.0})
    chosen = resolve(pc, {"dlm_preset": "sudoku"}, FULL_ATTENTION).params
    assert chosen.frequencies == "f"
    assert (chosen.most, chosen.position_weight) == (10.0, 0.0)


@pytest.mark.parametrize("wrong", ["gsm8k", "", 3, ["paper"], True])
@pytest.mark.parametrize(
    "request_of",
    [
        lambda value: {"dlm_strategy": "klass", "dlm_preset": value},
        lambda value: {
            "dlm": {"strategy": "klass", "strategy_config": {"preset": value}}
        },
    ],
)
def test_an_unknown_preset_is_told_the_known_ones(request_of: Any, wrong: Any):
    with pytest.raises(ValueError, match="preset") as refusal:
        resolve(DlmConfig(), request_of(wrong), FULL_ATTENTION)
    for preset in (DEFAULT, *STRATEGIES["klass"].Params.presets):
        assert preset in str(refusal.value)
    assert refusal.value.field in ("dlm_preset", "dlm.strategy_config.preset")
    with pytest.raises(ValueError, match="preset"):
        DlmConfig.from_mapping(
            {"strategy": "klass", "strategy_config": {"preset": wrong}}, where="flags"
        )


def test_where_there_are_no_presets_the_name_is_unknown():
    assert not STRATEGIES["factor"].Params.presets
    assert "unknown option" in refuse("factor", "preset", "paper")


@pytest.mark.parametrize("name", OURS)
def test_what_needs_the_whole_canvas_is_not_for_block_causal_models(name: str):
    request = {"dlm_strategy": name}
    if STRATEGIES[name].scope == "block":
        return
    assert resolve(DlmConfig(), request, FULL_ATTENTION).block_length == 0
    asked = resolve(DlmConfig(), request | {"dlm_block_length": 16}, FULL_ATTENTION)
    assert asked.block_length == 16
    if STRATEGIES[name].scope == "blocks":
        return
    with pytest.raises(ValueError, match="needs full attention") as refusal:
        resolve(DlmConfig(), request, BLOCK_CAUSAL)
    assert "threshold" in str(refusal.value)
    assert repr(name) in str(refusal.value)


def test_the_servers_block_length_is_for_its_own_strategy():
    canvas = [name for name in OURS if STRATEGIES[name].scope != "block"]
    assert canvas
    for name in canvas:
        other = DlmConfig(strategy="threshold", block_length=16)
        own = DlmConfig(strategy=name, block_length=64)
        request = {"dlm_strategy": name}
        assert resolve(other, request, FULL_ATTENTION).block_length == 0
        assert resolve(own, request, FULL_ATTENTION).block_length == 64
