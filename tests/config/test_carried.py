# SPDX-License-Identifier: Apache-2.0
"""A request's configuration reaches the engine as plain data, and is the same there."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
import pytest
from pydantic import PrivateAttr, model_validator
from vllm.sampling_params import SamplingParams

from vllm_dlm.admission.handover import (
    note,
    noted,
    private_copy,
    send_off,
    take_notes,
)
from vllm_dlm.config.carried import (
    CARRIED,
    carry,
    from_plain,
    request_config,
    to_plain,
)
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import RequestConfig, resolve
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, Strategy

FULL = ModelDefaults("threshold", 32, mask_token_id=9)
BLOCKS = ModelDefaults("threshold", 8, mask_token_id=9, attention="block")
CAUSAL = ModelDefaults("threshold", 8, 9, attention="causal", leads=True)
UNIFORM = ModelDefaults("renoise", 8, -1, attention="causal", noise="uniform")
OURS = [name for name in STRATEGIES if STRATEGIES[name].__module__.startswith("vllm_")]
REQUIRED = {"replay": {"dlm_recorded_steps": [0, 2, 1]}}


def sent(plain: Any) -> Any:
    """What a message to another process makes of it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(plain))


def assert_travels(config: RequestConfig) -> None:
    plain = to_plain(config)
    assert plain is not None
    for received in (plain, sent(plain)):
        built = from_plain(received)
        assert built == config
        assert built.params.model_fields_set == config.params.model_fields_set
        # Requests are grouped by how their parameters print.
        assert repr(built.params) == repr(config.params)


@pytest.mark.parametrize("name", OURS)
def test_parameters_of_every_strategy(name: str):
    asked = {"dlm_strategy": name} | REQUIRED.get(name, {})
    model = CAUSAL if STRATEGIES[name].verifies else FULL
    if STRATEGIES[name].noise == "uniform":
        model = UNIFORM
    assert_travels(resolve(DlmConfig(), asked, model))


@pytest.mark.parametrize(
    ("options", "defaults"),
    [
        ({"strategy_config": {"threshold": "0.5"}, "block_length": 8}, FULL),
        ({"strategy": "joint", "strategy_config": {"preset": "speed"}}, FULL),
        ({"strategy": "eoser", "strategy_config": {"schedule": "doubling"}}, FULL),
        ({"cache": "window", "cache_config": {"active_window": 8}}, FULL),
        ({"strategy": "static", "steps": 4, "reference_exact": True}, FULL),
        ({"strategy": "saber", "eotp": "token", "eotp_threshold": 0.5}, FULL),
        ({"growth": "daedal", "growth_config": {"window": 8}}, FULL),
        ({"tccf": {"trigger": "</think>", "check": [1, 2]}}, BLOCKS),
        ({"step_map": True, "sub_block_length": 4, "cache": "dual"}, BLOCKS),
    ],
)
def test_options(options: dict[str, Any], defaults: ModelDefaults):
    assert_travels(resolve(DlmConfig(), {"dlm": options}, defaults))


def test_options_give_way_to_what_they_say():
    asked = {"dlm": {"steps": 2}, "dlm_strategy": "static", "kv_transfer_params": {}}
    config = resolve(DlmConfig(), asked, FULL)
    carried = carry(asked, config)
    assert carried.keys() == {"kv_transfer_params", CARRIED}
    # The server's options are in it: they are not looked at again.
    assert request_config(carried, DlmConfig(steps=7), BLOCKS) == config


def test_a_request_by_no_front_end_of_ours_is_read_by_the_engine():
    asked = {"dlm_strategy": "static", "dlm_steps": 2}
    server = DlmConfig(block_length=16)
    assert request_config(asked, server, FULL) == resolve(server, asked, FULL)
    assert request_config(None, server, FULL) == resolve(server, None, FULL)


def test_no_client_can_send_it():
    plain = to_plain(resolve(DlmConfig(), None, FULL))
    for asked in ({CARRIED: plain}, {"dlm": {CARRIED.removeprefix("dlm_"): plain}}):
        with pytest.raises(ValueError, match="unknown option"):
            resolve(DlmConfig(), asked, FULL)


class Speed(StrEnum):
    FAST = "fast"


class OfAnotherType(Params):
    speed: Speed = Speed.FAST


class WithAList(Params):
    words: list[str] = []


class WithMore(Params):
    """Keeps what no field says."""

    speed: str = "fast"
    _steps: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _count(self) -> WithMore:
        self._steps = len(self.speed)
        return self


@pytest.mark.parametrize(
    ("kind", "value"),
    [(OfAnotherType, "fast"), (WithAList, ["a"]), (WithMore, "slowly")],
)
def test_parameters_that_are_no_plain_data_are_read_by_the_engine(
    kind: type[Params], value: Any, monkeypatch: pytest.MonkeyPatch
):
    class Rule(Strategy):
        name = "rule"
        Params = kind

    monkeypatch.setitem(STRATEGIES._targets, "rule", "tests:Rule")
    monkeypatch.setitem(STRATEGIES._loaded, "rule", Rule)
    [field] = kind.model_fields
    asked = {"dlm_strategy": "rule", f"dlm_{field}": value}
    config = resolve(DlmConfig(), asked, FULL)
    assert to_plain(config) is None
    assert carry(asked, config) == asked
    assert request_config(sent(carry(asked, config)), DlmConfig(), FULL) == config


def test_notes_are_taken_in_a_copy():
    asked = {"dlm_strategy": "static", "other": 1}
    params = SamplingParams(extra_args=asked)
    config = resolve(DlmConfig(), asked, FULL)
    note(params, config)
    assert noted(params) is None

    copy = private_copy(params)
    assert private_copy(copy) is copy
    assert noted(copy) is None
    note(copy, config)
    assert noted(copy) == config
    assert copy.extra_args == asked

    # As vLLM copies them for the engine, deeply or not.
    engines = copy.clone()
    copy.skip_clone = True
    for request in (engines, copy.clone()):
        assert noted(request) == config
        send_off(request)
        assert type(request.extra_args) is dict
        assert request.extra_args.keys() == {"other", CARRIED}
    assert noted(copy) == config
    assert params.extra_args is asked
    assert asked == {"dlm_strategy": "static", "other": 1}


def test_without_a_note_options_go_as_they_came():
    for asked in (None, {"other": 1}):
        params = SamplingParams(extra_args=asked)
        take_notes(params)
        send_off(params)
        assert params.extra_args == asked
