# SPDX-License-Identifier: Apache-2.0
"""What block-causal models cannot do is refused, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, params
from reference.checkpoints import write_checkpoint
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

SDAR = "SDAR-4B-Chat-b16"


@pytest.fixture(scope="module")
def sdar(engines: Callable[..., Engine], tmp_path_factory) -> BlockEngines:
    return BlockEngines(engines, tmp_path_factory.getbasetemp(), SDAR)


@pytest.fixture(scope="module")
def folder(sdar: BlockEngines, tmp_path_factory) -> Path:
    return tmp_path_factory.getbasetemp() / SDAR


def configure(
    folder: Path, dlm: dict[str, Any] | None = None, **options: Any
) -> VllmConfig:
    """The configuration that an engine would start with."""
    return EngineArgs(
        str(folder),
        dtype="float32",
        max_num_seqs=8,
        additional_config={"dlm": dlm or {}},
        **({"max_model_len": 250} | options),
    ).create_engine_config()


@pytest.mark.parametrize(
    ("dlm", "options", "said"),
    [
        pytest.param(
            {"block_length": 24},
            {"block_size": 32},
            ["block length 24", "--block-size 96", "--no-enable-prefix-caching"],
            id="pages of no whole blocks",
        ),
        pytest.param(
            {},
            {"hf_overrides": {"mask_token_id": 128}},
            ["mask_token_id 128", "vocabulary of 128", "--hf-overrides"],
            id="mask outside the vocabulary",
        ),
        pytest.param(
            {"cache": "prefix"},
            {},
            ["cache 'prefix'", "leave it at 'none'", "'dual' if", "sub-blocks"],
            id="cache",
        ),
        pytest.param(
            {"cache": "dual"},
            {},
            ["cache 'dual'", "blocks of 16 have none", "sub_block_length below 16"],
            id="no sub-blocks",
        ),
        pytest.param(
            {"cache": "dual", "sub_block_length": 16},
            {},
            ["cache 'dual'", "leave it at 'none'"],
            id="a sub-block as long as the block",
        ),
        pytest.param(
            {"block_length": "canvas"},
            {},
            ["block_length 'canvas'", "full attention", "give the length"],
            id="the canvas as a block",
        ),
        pytest.param(
            {},
            {"max_num_batched_tokens": 31},
            ["max_num_batched_tokens 31", "two blocks of 16", "at least 32"],
            id="forwards of less than two blocks",
        ),
        pytest.param(
            {"steps": 8, "steps_per_block": 4},
            {},
            ["steps or steps_per_block, not both"],
            id="steps counted twice",
        ),
        pytest.param(
            {"block_length": 256},
            {},
            ["block_length 256", "canvas of 250", "lower it"],
            id="a block longer than the context",
        ),
    ],
)
def test_refused_at_start(
    folder: Path, dlm: dict[str, Any], options: dict[str, Any], said: list[str]
):
    with pytest.raises(ValueError) as error:
        configure(folder, dlm, **options)
    assert [part for part in said if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("dlm", "options", "page"),
    [
        ({}, {}, None),  # vLLM's own choice, of whole blocks
        ({"block_length": 24}, {}, 96),
        ({"block_length": 24}, {"block_size": 96}, 96),
        ({"block_length": 24}, {"block_size": 32, "enable_prefix_caching": False}, 32),
    ],
)
def test_pages_of_whole_blocks(
    folder: Path, dlm: dict[str, Any], options: dict[str, Any], page: int | None
):
    cache = configure(folder, dlm, **options).cache_config
    assert cache.enable_prefix_caching == options.get("enable_prefix_caching", True)
    if page is None:
        assert cache.block_size % BLOCK == 0
    else:
        assert cache.block_size == page


def test_forwards_of_two_blocks_suffice(folder: Path):
    config = configure(folder, max_num_batched_tokens=32)
    assert config.scheduler_config.max_num_scheduled_tokens == 32
    assert config.scheduler_config.enable_chunked_prefill
    # A context that has no room for two blocks needs no more than itself.
    configure(folder, max_num_batched_tokens=20, max_model_len=20)


def test_blocks_counted_from_the_prompt_turn_sharing_off(tmp_path: Path):
    name = "Qwen3-0.6B-diffusion-bd3lm-v0.1"
    folder = write_checkpoint("a2d_qwen3", tmp_path / name, seed=2)
    cache = configure(folder, enable_prefix_caching=True).cache_config
    assert not cache.enable_prefix_caching


@pytest.mark.parametrize(
    ("dlm", "said"),
    [
        ({"block_length": 8}, ["block_length is 16", "--dlm-block-length"]),
        ({"block_length": "canvas"}, ["block_length is 16", "--dlm-block-length"]),
        ({"cache": "prefix"}, ["cache 'prefix'", "leave it at 'none'"]),
        ({"steps": 8, "steps_per_block": 4}, ["steps or steps_per_block, not both"]),
    ],
)
def test_refused_per_request(sdar: BlockEngines, dlm: dict[str, Any], said: list[str]):
    engine = sdar()
    with pytest.raises(VLLMValidationError) as error:
        engine.add(make_prompt(5), params(8, dlm=dlm))
    assert [part for part in said if part not in str(error.value)] == []
    assert not engine.busy


def test_what_is_said_again_is_not_refused(sdar: BlockEngines):
    said = {"block_length": BLOCK, "cache": "none"}
    (result,) = sdar().run([make_prompt(5)], params(8, dlm=said, ignore_eos=True))
    assert len(result.tokens) == 8
