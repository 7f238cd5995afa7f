# SPDX-License-Identifier: Apache-2.0
"""A server's options over those in the model's folder, by option and by pair."""

from types import SimpleNamespace

import pytest

from vllm_dlm.config.levels import config_entries, folder_options, over_folder
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve

DEFAULTS = ModelDefaults("threshold", 32, mask_token_id=9)
ENTROPY = {
    "strategy": "entropy",
    "strategy_config": {"threshold": 0.5},
    "block_length": 16,
}


def merged(folder, **server):
    config = SimpleNamespace(dlm_options=folder)
    given = DlmConfig.from_mapping(server, where="server")
    return over_folder(given, folder_options(config))


def test_a_folder_s_options_are_those_that_the_server_leaves_open():
    config = resolve(merged(ENTROPY, eotp="block"), None, DEFAULTS)
    assert (config.strategy, config.params.threshold) == ("entropy", 0.5)
    assert (config.block_length, config.eotp) == (16, "block")
    config = resolve(merged(ENTROPY, block_length=8), None, DEFAULTS)
    assert (config.strategy, config.block_length) == ("entropy", 8)
    request = {"dlm_block_length": 4, "dlm_threshold": 0.25}
    config = resolve(merged(ENTROPY), request, DEFAULTS)
    assert (config.block_length, config.params.threshold) == (4, 0.25)


def test_parameters_are_for_the_strategy_that_they_were_set_for():
    config = merged(ENTROPY, strategy="threshold")
    assert resolve(config, None, DEFAULTS).params.threshold == 0.9
    assert config.strategy_config == {}
    # Nor do its blocks count for another one, which may want the whole canvas.
    assert resolve(config, None, DEFAULTS).block_length == 32
    config = resolve(merged(ENTROPY, strategy="ass"), None, DEFAULTS)
    assert config.sized(64, 1024).block_length == 64
    # A server's parameters without a strategy are for the folder's.
    config = merged(ENTROPY, strategy_config={"threshold": 0.1})
    assert resolve(config, None, DEFAULTS).params.threshold == 0.1
    config = merged(ENTROPY, strategy="entropy")
    assert resolve(config, None, DEFAULTS).params.threshold == 0.5
    # So are a request's of another strategy.
    config = resolve(merged(ENTROPY), {"dlm_strategy": "threshold"}, DEFAULTS)
    assert config.params.threshold == 0.9


def test_a_policy_s_parameters_and_a_schedule_go_with_it():
    folder = {"cache": "vicinity", "cache_config": {"look_back": 5}}
    assert merged(folder).cache_config == {"look_back": 5}
    assert merged(folder, cache="dual").cache_config == {}
    again = merged(folder, cache="vicinity", cache_config={"look_ahead": 7})
    assert again.cache_config == {"look_back": 5, "look_ahead": 7}
    folder = {"strategy": "static", "steps_per_block": 4}
    config = merged(folder, steps=32)
    assert (config.steps, config.steps_per_block) == (32, None)
    assert merged(folder).steps_per_block == 4


def test_what_goes_into_config_json():
    assert config_entries({}) == {}
    assert config_entries(ENTROPY) == {"dlm_options": ENTROPY}
    with pytest.raises(ValueError, match="strategies are|threshold"):
        config_entries({"strategy": "entropi"})
    with pytest.raises(ValueError, match="filter_dir"):
        config_entries({"filter_dir": "/tmp"})
