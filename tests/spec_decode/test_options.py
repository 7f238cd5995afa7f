# SPDX-License-Identifier: Apache-2.0
"""A user's speculative config: what is taken, and what the errors say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from spec_decode.harness import Engine, params, write_llama
from transformers import PreTrainedTokenizerFast
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.transformers_utils.config import get_config

from vllm_dlm.config.aliases import resolve
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.spec_decode import front_end
from vllm_dlm.spec_decode.options import (
    METHODS,
    REQUEST_KEY,
    WithDrafter,
    from_plain,
    parse,
    request_limit,
    to_plain,
)


@pytest.mark.parametrize("method", METHODS)
def test_options_travel_to_the_worker(method: str):
    kind = METHODS[method]
    given = {"method": method, "num-speculative-tokens": 5}
    if issubclass(kind, WithDrafter):
        given["model"] = "folder"
    assert bool(kind.speculator) != bool(kind.why_not_v2)
    options = parse(given)
    assert options.num_speculative_tokens == 5
    assert from_plain(to_plain(method, options)) == options
    assert kind.summary and kind.paper


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "deer"}, 'set "model"'),
        ({"method": "del", "model": "x"}, 'leave out "model"'),
        ({"method": "aded", "windw": 3}, "Did you mean 'window'"),
        ({"method": "deer", "model": "x", "context": "kv"}, "'recompute'"),
        ({"method": "del", "num_speculative_tokens": 129}, "less than or equal to 128"),
        ({"method": "del", "num_speculative_tokens": True}, "not a boolean"),
        ({"method": "specdec++", "model": "x", "stop_threshold": 1.0}, "less than 1"),
        ({"method": "del", "statistics": "both"}, "'request' or 'shared'"),
        ({"method": "del", "stop": "never"}, "'length', 'both' or 'gain'"),
        ({"method": "aded", "memory": "none"}, "'request' or 'shared'"),
        ({"method": "aded", "memory_size": 10}, "greater than or equal to 1024"),
        ({"method": "aded", "memory_size": 2048}, "set memory to 'shared'"),
    ],
)
def test_invalid_options(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="speculative config of") as error:
        parse(config)
    assert message in str(error.value)


def test_a_requests_own_limit():
    assert request_limit(None, 8) == 8
    assert request_limit({REQUEST_KEY: 0}, 8) == 0
    assert request_limit({REQUEST_KEY: 3.0}, 8) == 3
    for wrong in (9, -1, 2.5, "3", True, None):
        with pytest.raises(ValueError, match="from 0 .no speculation. to 8"):
            request_limit({REQUEST_KEY: wrong}, 8)


def with_limit(limit: Any) -> SamplingParams:
    return params(4, extra_args={REQUEST_KEY: limit})


def test_a_limit_without_speculation_is_refused(plain: Engine):
    with pytest.raises(VLLMValidationError, match="no speculative decoding"):
        plain.run([[3, 4]], with_limit(2))


def start(model: Path, speculative: dict[str, Any], **options: Any) -> Engine:
    # Refused before anything is built: no fixture, which would share the engine.
    return Engine(model, speculative, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"worker_cls": "my.Worker"}, "brings its own worker class"),
        ({"async_scheduling": True}, "leave out --async-scheduling"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
    ],
)
def test_options_of_vllm_that_do_not_go_with_it(
    target: Path, options: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        start(target, {"method": "aded"}, **options)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("aded", "custom_class, which V2 does not have"),
        ("del", "reads the target's layers between steps"),
        ("specdec++", "steers V1's draft model token by token"),
    ],
)
def test_methods_of_model_runner_v1_say_why(target: Path, method: str, reason: str):
    config = {"method": method}
    if method == "specdec++":
        config["model"] = str(target)
    with pytest.raises(ValueError, match="runs on model runner V1: ") as error:
        start(target, config, runner=2)
    assert reason in str(error.value)
    assert str(error.value).endswith("unset VLLM_USE_V2_MODEL_RUNNER")


@pytest.mark.parametrize(
    ("asked", "has_triton", "gone", "runner"),
    [
        (None, False, 0, 1),
        (None, True, 0, 2),
        (False, True, 0, 1),
        (True, False, 0, 2),
        (None, False, 1, 2),
        (True, True, 2, 1),
    ],
)
def test_the_runner_is_what_the_host_has(
    monkeypatch: pytest.MonkeyPatch,
    asked: bool | None,
    has_triton: bool,
    gone: int,
    runner: int,
):
    monkeypatch.setattr("vllm.envs.VLLM_USE_V2_MODEL_RUNNER", asked, raising=False)
    monkeypatch.setattr(front_end, "HAS_TRITON", has_triton)
    modules = {**front_end.RUNNERS, gone: "vllm.v1.there_is_no_such_module"}
    modules.pop(0, None)
    monkeypatch.setattr(front_end, "RUNNERS", modules)
    deer = parse({"method": "deer", "model": "x"})
    assert front_end._runner("deer", deer) == runner
    if gone == 1:
        with pytest.raises(ValueError, match="custom_class.*; use 'deer'"):
            front_end._runner("aded", parse({"method": "aded"}))


def config_of(drafter: str, **options: Any) -> Any:
    """The finished configuration of llama-tiny with this drafter."""
    speculative = {"method": "deer", "model": drafter, **options}
    return EngineArgs(
        "llama-tiny", speculative_config=speculative
    ).create_engine_config()


@pytest.mark.parametrize("drafter", ["deer-tiny", "deer-tiny-block"])
def test_drafts_are_as_long_as_the_drafter_was_trained_for(
    drafter: str, caplog: pytest.LogCaptureFixture
):
    assert config_of(drafter).speculative_config.num_speculative_tokens == 32
    assert "was trained for" not in caplog.text
    config = config_of(drafter, num_speculative_tokens=33)
    assert config.speculative_config.num_speculative_tokens == 33
    assert "was trained for 32 masks behind a text" in caplog.text


def test_drafts_of_a_block_model_are_its_blocks(caplog: pytest.LogCaptureFixture):
    # sdar-tiny has the vocabulary of llama-tiny.
    blocks = ModelDefaults.from_hf_config(
        get_config(resolve("sdar-tiny"), trust_remote_code=False)
    ).block_length
    config = config_of("sdar-tiny")
    assert config.speculative_config.num_speculative_tokens == blocks
    assert "was trained for" not in caplog.text
    config_of("sdar-tiny", num_speculative_tokens=blocks + 1)
    assert f"was trained for {blocks} masks" in caplog.text


def test_a_vocabulary_of_another_size_is_refused(target: Path, tmp_path: Path):
    other = write_llama(tmp_path, seed=5, num_layers=1, vocab_size=96)
    with pytest.raises(ValueError, match="vocab"):
        config = {"method": "deer", "model": str(other), "num_speculative_tokens": 4}
        start(target, config)


def test_a_tokenizer_of_the_same_size_with_other_ids_is_refused(tmp_path: Path):
    drafter = tmp_path / "drafter"
    shutil.copytree(resolve("llama-tiny-draft"), drafter)
    file = drafter / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    swapped = {"Ada": "Amir", "Amir": "Ada"}
    file.write_text(
        re.sub(r'"(Ada|Amir)":', lambda found: f'"{swapped[found[1]]}":', text),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="token 'A.*' is .* for the target and"):
        start(
            Path(resolve("llama-tiny")),
            {"method": "specdec++", "model": str(drafter)},
            skip_tokenizer_init=False,
        )


def write_tokenizer(folder: Path, words: str) -> None:
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_the_drafters_revision_is_the_one_that_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = {"vocab_size": 6, "num_layers": 1}
    model = write_llama(tmp_path / "target", seed=0, **sizes)
    write_tokenizer(model, "abcdef")
    # The hub's cache of a drafter with two revisions.
    cached = tmp_path / "hub" / "models--someone--drafter"
    for revision, words in (("main", "fedcba"), ("right", "abcdef")):
        snapshot = write_llama(cached / "snapshots" / revision, seed=1, **sizes)
        write_tokenizer(snapshot, words)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / revision).write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", tmp_path / "hub")
    config = {"method": "specdec++", "model": "someone/drafter"}
    with pytest.raises(ValueError, match="token '.' is . for the target and . for"):
        EngineArgs(str(model), speculative_config=config).create_engine_config()
    config |= {"revision": "right"}
    EngineArgs(str(model), speculative_config=config).create_engine_config()


def test_a_token_budget_that_cuts_drafts_is_told(
    target: Path, caplog: pytest.LogCaptureFixture
):
    def start_with(budget: int) -> None:
        EngineArgs(
            str(target),
            speculative_config={"method": "aded", "num_speculative_tokens": 7},
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=16,
            max_num_batched_tokens=budget,
        ).create_engine_config()

    start_with(128)
    assert "drafts are shorter" not in caplog.text
    start_with(127)
    assert "16 requests with drafts of 7 tokens are 128 tokens a step" in caplog.text


def test_a_diffusion_model_is_no_target():
    with pytest.raises(ValueError, match="writes many tokens per forward by itself"):
        start(Path("llada-tiny"), {"method": "aded"}, skip_tokenizer_init=False)
