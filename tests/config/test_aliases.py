# SPDX-License-Identifier: Apache-2.0
"""Short model names, without and with a hub."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from vllm_dlm.config import aliases
from vllm_dlm.model_executor.models.tables import ARCHITECTURES, HF_CONFIGS


@pytest.fixture
def empty_cache(monkeypatch):
    monkeypatch.setattr(aliases, "cached_folder", lambda *args: None)


def hub(monkeypatch, outcome=None):
    asked = []

    def metadata(url, **kwargs):
        asked.append(url)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return asked


def test_every_family_is_registered():
    for alias in aliases.ALIASES.values():
        known = alias.family.is_diffusion
        assert alias.family.model_type in HF_CONFIGS or not known
        assert (alias.family.architecture in ARCHITECTURES) is known


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("sdar-4b", "JetLM/SDAR-4B-Chat"),
        ("sdar-1.7b-b64", "JetLM/SDAR-1.7B-Chat-b64"),
        ("sdar-30b-a3b-b8", "JetLM/SDAR-30B-A3B-Chat-b8"),
        ("a2d-qwen3-0.6b-bd3lm", "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1"),
    ],
)
def test_names_of_variants(name, target):
    assert aliases.ALIASES[name].target == target


def test_other_names_and_folders_stay(tmp_path, monkeypatch):
    assert aliases.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llada").mkdir()
    assert aliases.resolve("llada") == "llada"


def test_built_in_model_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(aliases, "files", lambda package: tmp_path)
    folder = tmp_path / "assets" / "llada-tiny"
    with pytest.raises(ValueError, match="vllm-dlm train llada-tiny"):
        aliases.resolve("llada-tiny")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert aliases.resolve("llada-tiny") == str(folder)


def test_cached_checkpoint_is_used_without_asking(monkeypatch):
    monkeypatch.setattr(aliases, "cached_folder", lambda *args: "/cache/llada")
    asked = hub(monkeypatch, OSError())
    assert aliases.resolve("llada") == "GSAI-ML/LLaDA-8B-Instruct"
    assert not asked


def test_a_cache_without_weights_is_no_cache(tmp_path, monkeypatch):
    config = tmp_path / "config.json"
    config.write_text("{}")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: str(config)
    )
    assert aliases.cached_folder("some/model") is None
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert aliases.cached_folder("some/model") == str(tmp_path)


def test_reachable_hub_is_left_to_vllm(empty_cache, monkeypatch):
    asked = hub(monkeypatch)
    assert aliases.resolve("llada-base") == "GSAI-ML/LLaDA-8B-Base"
    assert "LLaDA-8B-Base" in asked[0]


def test_a_hub_that_refuses_is_reachable(empty_cache, monkeypatch):
    response = httpx.Response(401, request=httpx.Request("HEAD", "https://hub"))
    hub(monkeypatch, huggingface_hub.errors.GatedRepoError("no", response=response))
    assert aliases.resolve("llada-1.5") == "GSAI-ML/LLaDA-1.5"


@pytest.mark.parametrize(
    "outcome",
    [httpx.ConnectError("no route"), httpx.ConnectTimeout("slow"), OSError("offline")],
)
def test_unreachable_hub_ends_in_one_clear_sentence(empty_cache, monkeypatch, outcome):
    hub(monkeypatch, outcome)
    with pytest.raises(ValueError) as caught:
        aliases.resolve("llada")
    for fragment in ("hf download GSAI-ML/LLaDA-8B-Instruct", "folder", "llada-tiny"):
        assert fragment in str(caught.value)


def test_offline_mode_asks_nobody(empty_cache, monkeypatch):
    asked = hub(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf download"):
        aliases.resolve("llada")
    assert not asked


def test_other_errors_are_not_hidden(empty_cache, monkeypatch):
    hub(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        aliases.resolve("llada")
