# SPDX-License-Identifier: Apache-2.0
"""Weights: shards with an index, types as they were stored, the model's own layout."""

import json

import pytest

torch = pytest.importorskip("torch")

LAYOUTS = ("llada", "sdar", "dream")


def make_folder(folder, layout):
    if layout == "dream":
        from reference.checkpoints import write_checkpoint

        return write_checkpoint("dream", folder, seed=1)
    from training.tiny_learner import tiny_folder

    return tiny_folder(folder, layout)


def store_as(folder, dtype):
    """Write a folder's weights anew, in another type."""
    from vllm_dlm.files.model_folders import read_weights
    from vllm_dlm.files.tensor_files import write_safetensors

    file = folder / "model.safetensors"
    tensors = {name: one.to(dtype) for name, one in read_weights(file).items()}
    write_safetensors(file, tensors, {"format": "pt"})


def test_shards_are_filled_in_order():
    from vllm_dlm.training.weights import plan_shards

    sizes = {"a": 3, "b": 3, "c": 9, "d": 2, "e": 2}
    assert plan_shards(sizes, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(sizes, 100) == [list(sizes)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_load_as_one_file_does(tmp_path, layout, monkeypatch):
    from vllm_dlm.training import weights
    from vllm_dlm.training.learner import load_learner

    folder = make_folder(tmp_path / "model", layout)
    learner = load_learner(folder)
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    learner.save(tmp_path / "shards")
    monkeypatch.undo()
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and {*index["weight_map"].values()} == {f.name for f in files}
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    again = load_learner(tmp_path / "shards")
    for name, tensor in learner.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name])
    # Back into one file, in the same folder: no shard of the old ones is left.
    again.save(tmp_path / "shards")
    assert [f.name for f in (tmp_path / "shards").glob("model*safetensors*")] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_stays_bfloat16(tmp_path, layout):
    from vllm_dlm.files.model_folders import stored_dtypes
    from vllm_dlm.training.learner import load_learner

    folder = make_folder(tmp_path / "model", layout)
    store_as(folder, torch.bfloat16)
    # All weights are trained: in float32.
    learner = load_learner(folder)
    assert {one.dtype for one in learner.network.parameters()} == {torch.float32}
    learner.save(tmp_path / "out")
    assert {*stored_dtypes(tmp_path / "out").values()} == {torch.bfloat16}
    assert stored_dtypes(tmp_path / "out") == stored_dtypes(folder)


def test_what_is_frozen_stays_as_it_is_stored(tmp_path):
    pytest.importorskip("peft")
    from vllm_dlm.training.learner import load_learner

    folder = make_folder(tmp_path / "model", "llada")
    store_as(folder, torch.bfloat16)
    learner = load_learner(folder, lora_rank=2, dtype="bfloat16")
    for name, one in learner.network.named_parameters():
        assert one.requires_grad == ("lora_" in name)
        assert one.dtype == (torch.float32 if one.requires_grad else torch.bfloat16)
    ids = torch.randint(3, 128, (2, 9))
    where = torch.ones_like(ids, dtype=torch.bool)
    logits = learner.logits_at(ids, None, where)
    assert logits.dtype == torch.float32
    logits.sum().backward()


def test_a_dream_model_reads_its_logits_with_a_shift(tmp_path):
    """The logits of a position are those of the oracle's row to its left."""
    from reference.network import TinyModel

    from vllm_dlm.training.learner import load_learner

    folder = make_folder(tmp_path / "model", "dream")
    learner = load_learner(folder)
    learner.network.eval()
    assert learner.shift and learner.attention_block is None
    ids = torch.randint(3, 90, (1, 12))
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, [1, 7]] = True
    everyone = torch.ones(12, 12, dtype=torch.bool)
    with torch.no_grad():
        found = learner.logits_at(ids, None, where)
        oracle = TinyModel.from_folder(folder).forward(
            ids[0].tolist(), visible=everyone
        )
    torch.testing.assert_close(found, oracle[[0, 6]], rtol=1e-4, atol=1e-4)


def test_decoding_options_go_into_config_json(tmp_path):
    from training.tiny_learner import tiny_learner

    learner = tiny_learner(tmp_path / "model")
    decoding = {"strategy": "entropy", "strategy_config": {"threshold": 0.5}}
    learner.save(tmp_path / "out", decoding=decoding)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("dlm_options") == decoding
    assert config == json.loads((tmp_path / "model/config.json").read_text())
    with pytest.raises(ValueError, match="entropi"):
        learner.save(tmp_path / "out", decoding={"strategy": "entropi"})


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "missing.safetensors"}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, index):
    from vllm_dlm.training.learner import load_learner

    folder = make_folder(tmp_path / "model", "llada")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index|missing"):
        load_learner(folder)
