# SPDX-License-Identifier: Apache-2.0
"""Networks to train: logits of some positions, adapters, and the folder afterwards."""

import json

import pytest
from reference.adapters import merged
from safetensors.torch import load_file

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

LAYOUTS = ("llada", "sdar")


def make(folder, layout="llada", **options):
    from training.tiny_learner import tiny_learner

    return tiny_learner(folder, layout, **options)


def some_rows():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (2, 11), generator=generator)
    valid = torch.arange(11) < torch.tensor([[11], [8]])
    return ids, valid


def stir(network):
    """Make an adapter that does something: B is 0 at first."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_at_are_those_of_the_whole_forward(tmp_path, layout):
    learner = make(tmp_path, layout)
    learner.network.eval()
    ids, valid = some_rows()
    where = torch.zeros_like(valid)
    where[0, [2, 7]] = where[1, 5] = True
    with torch.no_grad():
        every = learner.network(ids, valid)
        found = learner.logits_at(ids, valid, where)
    torch.testing.assert_close(found, every[where])
    assert (learner.mask_id, learner.end_id, learner.shift) == (2, 0, False)
    assert learner.attention_block == (None if layout == "llada" else 4)


def test_a_shift_reads_the_row_to_the_left(tmp_path):
    learner = make(tmp_path)
    learner.network.eval()
    learner.shift = True
    ids, valid = some_rows()
    where = torch.zeros_like(valid)
    where[0, 3] = where[1, 1] = True
    with torch.no_grad():
        every = learner.network(ids, valid)
        found = learner.logits_at(ids, valid, where)
    torch.testing.assert_close(found, torch.stack([every[0, 2], every[1, 0]]))
    where[0, 0] = True
    with pytest.raises(ValueError, match="first position"):
        learner.logits_at(ids, valid, where)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_seen_and_positions_can_be_given(tmp_path, layout):
    """Two texts in one row, each seeing itself, are as two rows."""
    network = make(tmp_path, layout).network.eval()
    ids, _ = some_rows()
    both = ids.reshape(1, -1)
    text = torch.arange(22) // 11
    place = torch.arange(22) % 11
    block = place // 4 if layout == "sdar" else torch.zeros(22)
    seen = (text == text[:, None]) & (block <= block[:, None])
    with torch.no_grad():
        packed = network.hidden(both, seen=seen[None], positions=place[None])
        torch.testing.assert_close(packed.view(2, 11, -1), network.hidden(ids))


@pytest.mark.parametrize(
    ("layout", "targets", "names"),
    [
        ("llada", "reference", {"q_proj", "k_proj", "v_proj", "up_proj"}),
        (
            "llada",
            "all",
            {*("q_proj", "k_proj", "v_proj", "attn_out"), "ff_proj", "up_proj"}
            | {"ff_out"},
        ),
        *(
            (
                "sdar",
                targets,
                {*("q_proj", "k_proj", "v_proj", "o_proj")}
                | {"gate_proj", "up_proj", "down_proj"},
            )
            for targets in ("reference", "all")
        ),
    ],
)
def test_which_matrices_get_an_adapter(tmp_path, layout, targets, names):
    learner = make(tmp_path, layout, lora_rank=3, lora_targets=targets)
    trained = {
        name: parameter
        for name, parameter in learner.network.named_parameters()
        if parameter.requires_grad
    }
    assert all("lora_" in name for name in trained)
    # Two matrices in each of two layers; the head, LLaDA's other ff_out, has none.
    assert len(trained) == 2 * 2 * len(names)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == names
    assert all(".0." in name or ".1." in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_merges_into_the_model_s_own_layout(tmp_path, layout):
    from vllm_dlm.training.learner import load_learner

    before = make(tmp_path / "before", layout)
    learner = load_learner(tmp_path / "before", lora_rank=4, lora_alpha=6)
    stir(learner.network)
    learner.network.eval()
    ids, valid = some_rows()
    learner.save(tmp_path / "after")
    learner.save_adapter(tmp_path / "adapter")
    after = load_learner(tmp_path / "after")
    stored = load_file(tmp_path / "after/model.safetensors")
    for name, tensor in merged(tmp_path / "before", tmp_path / "adapter").items():
        torch.testing.assert_close(stored[name], tensor)
    with torch.no_grad():
        adapted = learner.network(ids, valid)
        torch.testing.assert_close(after.network.eval()(ids, valid), adapted)
        was = before.network.eval()(ids, valid)
        assert (adapted - was).abs().max() > 0.1
        with learner.without_adapter():
            assert torch.equal(learner.network(ids, valid), was)
        # It goes on with the adapter, and saving has changed nothing.
        assert torch.equal(learner.network(ids, valid), adapted)
    config = [
        json.loads((tmp_path / name / "config.json").read_text())
        for name in ("before", "after")
    ]
    assert config[0] == config[1]
    names = [sorted(each.network.state_dict().keys()) for each in (before, after)]
    assert names[0] == names[1]


def test_without_an_adapter_there_is_no_teacher(tmp_path):
    learner = make(tmp_path)
    assert not learner.has_adapter
    with pytest.raises(ValueError, match="no adapter"), learner.without_adapter():
        pass


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_rank": 0}, "at least 1"),
        ({"lora_rank": 2, "lora_targets": "some"}, "reference or all"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, "below 1"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"device": "nonsense"}, "nonsense"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        make(tmp_path, **options)


def test_what_is_no_model_is_refused(tmp_path):
    from vllm_dlm.training.learner import load_learner

    with pytest.raises(ValueError, match="no such folder"):
        load_learner(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_learner(tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*LLaDAModelLM"):
        load_learner("llama-tiny")
