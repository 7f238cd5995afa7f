# SPDX-License-Identifier: Apache-2.0
"""What a training needs, told from a config.json; and a step at the widths of 8B."""

import json

import pytest

from vllm_dlm.cli.command import main

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from vllm_dlm.training import memory  # noqa: E402
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape  # noqa: E402

LLADA_8B = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "vocab_size": 126464,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "weight_tying": False,
}
"""What is read of LLaDA-8B's config.json."""


def write_config(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLADA_8B | changes))
    return folder


def kept_bytes(network, ids, valid=None):
    """Bytes that autograd keeps of a forward of real tensors, but for the weights."""
    own = {each.untyped_storage().data_ptr() for each in network.parameters()}
    own |= {each.untyped_storage().data_ptr() for each in network.buffers()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = network.hidden(ids, valid)
    return sum(each.untyped_storage().nbytes() for each in kept.values()), hidden


SHAPE = LLaDAShape(
    vocab_size=128, d_model=64, n_layers=3, n_heads=4, mlp_hidden_size=160
)


def test_a_layer_keeps_what_a_count_by_hand_says():
    with torch.device("meta"):
        network = LLaDAModel(SHAPE)
    found = memory.estimate(network, dtype=torch.float32)
    size, inner, heads = SHAPE.d_model, SHAPE.mlp_hidden_size, SHAPE.n_heads
    # Both norms' inputs and outputs, and, on a CPU, what is between them; query, key,
    # value and output of attention; the gate before and behind silu, its factor, the
    # product. And of attention a number for each head, of each norm one.
    layer = 4 * (10 * size + 4 * inner + heads + 2)
    assert found.layer == layer
    # The embedding keeps the token's id, of 8 bytes.
    assert found.token == 3 * layer + 8
    assert found.token_again == 3 * 4 * size
    # Of a masked token: what the last norm keeps and its output, the log-softmax; and
    # backwards the gradient of the logits, twice.
    assert found.head == 4 * (3 * size + 1 + 3 * 128)
    norms = 7 * size
    assert found.parameters == SHAPE.num_parameters + norms == found.trained
    assert (found.weights, found.copies) == (0, 0)
    assert found.states == 16 * found.parameters


@pytest.mark.parametrize("rank", [None, 4])
def test_without_memory_is_kept_what_is_kept_with_it(rank):
    from vllm_dlm.training import lora

    with torch.device("meta"):
        network = LLaDAModel(SHAPE)
    found = memory.estimate(network, rank, dtype=torch.float32)
    real = LLaDAModel(SHAPE)
    if rank is not None:
        lora.add_adapter(real, rank)
    counts = [
        kept_bytes(real.eval(), torch.zeros(1, length, dtype=torch.long))[0]
        for length in (100, 300)
    ]
    assert abs((counts[1] - counts[0]) / 200 - found.token) <= 0.002 * found.token


def test_what_fits():
    found = memory.Estimate(
        parameters=8 * memory.GIB,
        trained=memory.GIB // 16,
        weights=16 * memory.GIB,
        states=memory.GIB,
        copies=memory.GIB,
        shared=0,
        head=1024.0,
        token=1024.0 * 1024,
        token_again=1024.0 * 128,
        layer=1024.0 * 32,
    )
    # 40 - 1.5 - 18 GiB; a row of 1,024 tokens keeps 1 GiB.
    assert found.rows(40, 1024, 0, False) == 20
    assert found.rows(40, 1024, 0, False, forwards=2) == 10
    # A masked token's logits are of 1 KiB: 1,024 of them 1 MiB.
    assert found.rows(40, 1024, 1024, False) == 20
    # 160 KiB a token: 131 rows.
    assert found.rows(40, 1024, 0, True) == 131
    assert found.rows(40, 1024, 0, True, forwards=2) == 72
    assert found.rows(16, 1024, 0, True) == 0
    # An adapter's weights are not split.
    assert found.fixed(8) == found.fixed() == 18 * memory.GIB


def test_weights_that_are_trained_are_split():
    found = memory.Estimate(
        *(10, 10, 0, 160, 20.0, 6), head=1.0, token=1.0, token_again=1.0, layer=1.0
    )
    assert [found.fixed(n) for n in (1, 2, 4)] == [180, 86, 46]


def test_the_command_needs_a_config_only(tmp_path, capsys):
    folder = write_config(
        tmp_path / "model",
        d_model=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=96,
    )
    command = ["train", "sft", str(folder), "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "of them trained" in printed and "on each of 8 GPUs" in printed
    assert main([*command, "--lora-rank", "8", "--row-length", "384"]) == 0
    printed = capsys.readouterr().out
    # 4 x (64 + 64) x 8 + 3 x (64 + 96) x 8, of two layers.
    assert "15,872 of an adapter trained" in printed
    assert "1,024" not in printed and "       384 " in printed
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_cannot_be_told_is_refused(tmp_path, capsys):
    folder = write_config(tmp_path / "model", architectures=["LlamaForCausalLM"])
    assert main(["train", "sft", str(folder), "--dry-run"]) == 2
    assert "what can be trained: LLaDAModelLM" in capsys.readouterr().err
    assert main(["train", "sft", "no/such-model", "--dry-run"]) == 2
    assert "there is no such folder, and the hub" in capsys.readouterr().err
    assert main(["train", "sft", str(folder)]) == 2
    assert "--output-dir is missing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "trained"), [("reference", 167_772_160), ("all", 335_544_320)]
)
def test_8b_with_an_adapter_of_rank_128(tmp_path, targets, trained):
    network = memory.build(write_config(tmp_path / "8b"))
    assert all(each.is_meta for each in network.parameters())
    found = memory.estimate(network, 128, targets)
    assert found.parameters == 8_015_581_184
    assert found.trained == trained
    # The one GPU of 24 GB of the published recipe: rows of 384, two forwards.
    rows = found.rows(24, 384, 256, True, forwards=2)
    assert rows >= 1
    assert found.rows(24, 384, 256, False, forwards=2) < rows


@pytest.mark.slow
def test_a_step_on_two_layers_of_8bs_widths():
    """In bfloat16, with an adapter: about 4 GiB."""
    from vllm_dlm.training import lora
    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.recipes.sft import corrupt, loss
    from vllm_dlm.training.rows import Row, lay_out, step_generator

    shape = LLaDAShape(
        vocab_size=126464,
        d_model=4096,
        n_layers=2,
        n_heads=32,
        mlp_hidden_size=12288,
        rope_theta=500000.0,
        max_sequence_length=4096,
    )
    with torch.device("meta"):
        told, network = LLaDAModel(shape), LLaDAModel(shape).bfloat16()
    wanted = memory.estimate(told, 128, "reference")
    torch.manual_seed(0)
    # Random bytes would be NaN in places: a few numbers, again and again.
    pattern = torch.randn(1 << 20).mul(0.02).bfloat16()
    tables = network.cos, network.sin
    network.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.fill_(1)
            else:
                flat = parameter.view(-1)
                for part in flat.split(len(pattern)):
                    part.copy_(pattern[: len(part)])
    network.cos, network.sin = tables
    lora.add_adapter(network, 128, targets="reference")
    learner = Learner(
        network=network.train(),
        mask_id=126336,
        end_id=126081,
        shift=False,
        attention_block=None,
        tokenizer=None,
        device=torch.device("cpu"),
        source=None,
        compute_dtype=torch.bfloat16,
    )
    trained = [each for each in network.parameters() if each.requires_grad]
    assert sum(each.numel() for each in trained) == 2 * 167_772_160 // 32
    ids = torch.randint(126000, (1, 96))
    with learner.autocast():
        kept, _ = kept_bytes(network.eval(), ids)
    estimated = wanted.token * 96 + wanted.copies
    assert abs(kept - estimated) < 0.02 * estimated
    network.train().checkpointing = True
    rows = [Row(list(range(5, 25)), [*range(30, 60), 126081])]
    rows += [Row(list(range(7, 17)), [*range(80, 90), 126081])] * 2
    masked = corrupt(lay_out(rows, end_id=126081), 126336, step_generator(1, 0))
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        found = loss(learner, masked)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert losses[1] < losses[0]
    frozen = [each for each in network.parameters() if not each.requires_grad]
    assert all(each.grad is None for each in frozen)
    assert {each.dtype for each in frozen} == {torch.bfloat16}
