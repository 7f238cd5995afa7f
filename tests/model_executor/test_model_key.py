# SPDX-License-Identifier: Apache-2.0
"""What was learned of a model is filed under its weights, not its path."""

import shutil
from types import SimpleNamespace

from reference.llada import write_random_checkpoint

from vllm_dlm.model_executor.model_key import model_key

CONFIG = SimpleNamespace(hidden_size=64, vocab_size=128)


def test_a_copy_has_the_same_key_and_other_weights_another(tmp_path):
    one = write_random_checkpoint(tmp_path / "a" / "model", seed=1)
    copy = tmp_path / "b" / "model"
    shutil.copytree(one, copy)
    other = write_random_checkpoint(tmp_path / "c" / "model", seed=2)
    key = model_key(str(one), None, CONFIG)
    assert key.startswith("model-")
    assert model_key(str(copy), None, CONFIG) == key
    assert model_key(str(other), None, CONFIG) != key


def test_a_filter_beside_the_weights_changes_nothing(tmp_path):
    folder = write_random_checkpoint(tmp_path / "model", seed=1)
    key = model_key(str(folder), None, CONFIG)
    (folder / "learn2pd").mkdir()
    (folder / "learn2pd" / "b32-none.safetensors").write_bytes(b"x")
    assert model_key(str(folder), None, CONFIG) == key


def test_a_hub_model_is_its_id_and_revision():
    one = model_key("org/model", None, CONFIG)
    assert one.startswith("model-")
    assert one == model_key("org/model", None, CONFIG)
    assert one != model_key("org/model", "v2", CONFIG)
    assert one != model_key("other/model", None, CONFIG)
