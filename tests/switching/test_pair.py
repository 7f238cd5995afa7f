# SPDX-License-Identifier: Apache-2.0
"""What is checked before two engines start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from spec_decode.harness import model_runner
from switching.conftest import ENGINE
from switching.reference import write_llama
from vllm.sampling_params import SamplingParams

from vllm_dlm.switching import sampling
from vllm_dlm.switching.entropy import LARGE, SMALL
from vllm_dlm.switching.entropy_stop import class_name
from vllm_dlm.switching.pair import MEMORY_SHARES, plan_pair


def plan(folders: Any, small: Any = None, large: Any = None, **options: Any) -> Any:
    """A plan for two folders; options of the engines, and of `plan_pair`."""
    models = dict(zip((SMALL, LARGE), map(str, folders), strict=True))
    return plan_pair(models, {SMALL: small or {}, LARGE: large or {}}, **options)


def test_the_package_exports_the_router():
    import vllm_dlm
    from vllm_dlm.switching.router import EntropyRouter

    assert vllm_dlm.EntropyRouter is EntropyRouter


def test_every_sampling_parameter_is_decided_upon():
    fields = {
        name for name in SamplingParams.__struct_fields__ if not name.startswith("_")
    }
    decided = [
        *sampling.SAME_IN_EVERY_TURN,
        *sampling.OF_THE_TEXT,
        *sampling.REFUSED,
    ]
    assert sorted(decided) == sorted(fields)


@pytest.mark.parametrize("runner", [1, 2])
def test_what_both_engines_get(folders, runner):
    small, large = folders
    pair = plan(folders, ENGINE, ENGINE | {"max_model_len": 128})
    assert pair.max_model_len == 128
    for model, folder in ((SMALL, small), (LARGE, large)):
        args = pair.engine_args[model]
        assert args.model == str(folder)
        assert args.max_model_len == 128
        assert args.additional_config == {"dlm_switching": model}
        with model_runner(runner):
            config = args.create_engine_config()
            assert config.use_v2_model_runner == (runner == 2)
            processor = class_name(config)
        assert config.model_config.logits_processors == [processor]


def test_the_plugin_must_be_on(folders, monkeypatch):
    monkeypatch.setenv("VLLM_DLM_DISABLE", "1")
    with pytest.raises(ValueError, match="VLLM_DLM_DISABLE=1 .* unset it"):
        plan(folders)


def test_memory_is_shared_unless_it_is_given(folders, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    pair = plan(folders, {}, {"gpu_memory_utilization": 0.5})
    shares = {
        model: args.gpu_memory_utilization for model, args in pair.engine_args.items()
    }
    assert shares == {SMALL: MEMORY_SHARES[SMALL], LARGE: 0.5}
    assert sum(MEMORY_SHARES.values()) <= 0.92  # vLLM's default for one engine


def test_the_reserved_token(folders, tmp_path):
    assert plan(folders).stop_token_id == 127  # no token of the tokenizer has it
    assert plan(folders, stop_token_id=2).stop_token_id == 2
    with pytest.raises(ValueError, match="ids go from 0 to 127"):
        plan(folders, stop_token_id=128)
    with pytest.raises(ValueError, match="True is not in the models' vocabulary"):
        plan(folders, stop_token_id=True)
    with pytest.raises(ValueError, match="0 ends a text already"):
        plan(folders, stop_token_id=0)
    # A vocabulary without gaps: the mask token is in no text of such a model.
    tokenizer = json.loads((folders[0] / "tokenizer.json").read_text())
    largest = max(tokenizer["model"]["vocab"].values())
    full = write_llama(tmp_path, seed=3, layers=1, vocab=largest + 1)
    used = set(tokenizer["model"]["vocab"].values()) | {
        token["id"] for token in tokenizer["added_tokens"]
    }
    assert used == set(range(largest + 1))
    assert plan((full, folders[1])).stop_token_id == 2


def test_models_must_share_a_tokenizer(folders, tmp_path):
    other = write_llama(tmp_path, seed=3, layers=1)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ada"], vocabulary["Ben"] = vocabulary["Ben"], vocabulary["Ada"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="different tokenizers: .* 2 of them .*'Ada'"):
        plan((folders[0], other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_config": {"method": "ngram"}}, "large engine .* speculative"),
        ({"tensor_parallel": 2}, "options of the large engine: .*tensor_parallel"),
        ({"skip_tokenizer_init": True}, "needs its tokenizers"),
    ],
)
def test_options_that_are_refused(folders, options, message):
    with pytest.raises(ValueError, match=message):
        plan(folders, {}, options)


def test_diffusion_models_are_refused(folders):
    with pytest.raises(ValueError, match="'llada-tiny', does not write token by token"):
        plan((folders[0], Path("llada-tiny")))
