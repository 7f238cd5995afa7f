# SPDX-License-Identifier: Apache-2.0
"""Packed rows give what padded rows give; so does each way to compute attention."""

import pytest

torch = pytest.importorskip("torch")

from vllm_dlm.training import attention, packing  # noqa: E402
from vllm_dlm.training.distributed import layers_of  # noqa: E402
from vllm_dlm.training.packing import (  # noqa: E402
    hidden_at,
    is_worth_packing,
    pack_rows,
)
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape  # noqa: E402

LENGTHS = [5, 17, 3, 9, 17, 1]
SHAPE = LLaDAShape(
    vocab_size=128, d_model=64, n_layers=2, n_heads=4, mlp_hidden_size=96
)


def make_network(layout="llada"):
    torch.manual_seed(0)
    if layout == "llada":
        return LLaDAModel(SHAPE).train()
    from vllm_dlm.training.block_causal import make_block_causal

    return make_block_causal(SHAPE, 4).train()


def make_batch(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(128, (len(lengths), max(lengths)), generator=generator)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids, valid


@pytest.mark.parametrize("one_row", [False, True])
def test_every_token_has_one_place(one_row):
    ids, valid = make_batch()
    packed = pack_rows(valid, one_row=one_row)
    found = packed.pack(ids)
    assert found.shape == ((1, sum(LENGTHS)) if one_row else (4, 17))
    assert (packed.row >= 0).sum() == sum(LENGTHS)
    torch.testing.assert_close(packed.unpack(found), ids.masked_fill(~valid, 0))
    numbers = torch.arange(len(LENGTHS))[:, None].expand_as(valid)
    filled = packed.row >= 0
    assert (packed.pack(numbers) == packed.row)[filled].all()
    places = torch.arange(17).expand_as(valid)
    assert (packed.pack(places) == packed.position)[filled].all()
    where = valid & (ids % 3 == 0)
    assert packed.at(found, where).tolist() == ids[where].tolist()


@pytest.mark.parametrize("block", [None, 4])
def test_a_token_sees_its_own_row_only(block):
    _, valid = make_batch()
    packed = pack_rows(valid, one_row=True)
    mask = packed.mask(attention_block=block)[0]
    at = [(row, place) for row, n in enumerate(LENGTHS) for place in range(n)]
    for query, (row, place) in enumerate(at):
        for key, (other, from_place) in enumerate(at):
            sees = row == other and (block is None or from_place // 4 <= place // 4)
            assert mask[query, key] == sees


def loss_and_gradients(network, ids, valid, **how):
    """Cross-entropy of every third token, by `hidden_at`."""
    where = valid & (torch.arange(ids.shape[1]) % 3 == 0)
    network.zero_grad()
    logits = network.head(hidden_at(network, ids, valid, where, **how))
    loss = torch.nn.functional.cross_entropy(logits, ids[where])
    loss.backward()
    return loss, {name: one.grad.clone() for name, one in network.named_parameters()}


@pytest.fixture
def as_xformers(monkeypatch):
    """All rows in one, as with xformers; SDPA computes what it would."""

    def segments(rows):
        return rows.mask()

    monkeypatch.setattr(packing, "has_xformers", lambda *_: True)
    monkeypatch.setattr(packing.PackedRows, "segments", segments)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("layout", ["llada", "sdar"])
def test_packed_is_padded(layout, plain, monkeypatch):
    if not plain:
        monkeypatch.setattr(attention, "LONGEST_PLAIN", 0)
    network, (ids, valid) = make_network(layout), make_batch()
    wanted = loss_and_gradients(network, ids, valid, packed=False)
    found = loss_and_gradients(network, ids, valid, packed=True)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


def test_packed_into_one_row_is_padded(as_xformers):
    network, (ids, valid) = make_network(), make_batch()
    wanted = loss_and_gradients(network, ids, valid, packed=False)
    found = loss_and_gradients(network, ids, valid, packed=True)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("layout", ["llada", "sdar"])
def test_what_is_seen_and_positions_are_packed_too(layout):
    """As in block diffusion: another mask, and positions that begin again."""
    network, (ids, valid) = make_network(layout), make_batch()
    at = torch.arange(17)
    seen = ((at[:, None] - at).abs() <= 2) | (at[:, None] % 5 == at % 5)
    each = seen.expand(len(ids), 17, 17).clone()
    each[2] = at[:, None] >= at
    for mask in (seen[None], each):
        how = {"seen": mask, "positions": (at % 9)[None]}
        wanted = loss_and_gradients(network, ids, valid, packed=False, **how)
        found = loss_and_gradients(network, ids, valid, packed=True, **how)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


def test_several_queries_of_one_key():
    """Grouped heads, as of Qwen2 and Qwen3, are transformers' own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from vllm_dlm.training.decoders import DecoderModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = Qwen2Config(
        vocab_size=128, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(config)
    ids, valid = make_batch()
    seen = valid[:, None, None, :].expand(-1, -1, ids.shape[1], -1)
    network = DecoderModel(theirs)
    assert network.head_dim == 8
    with torch.no_grad():
        found = network.hidden(ids, valid)
        theirs.set_attn_implementation("eager")
        mask = torch.zeros(seen.shape).masked_fill(~seen, -1e30)
        wanted = theirs.model(ids, attention_mask={"full_attention": mask})
    torch.testing.assert_close(found, wanted.last_hidden_state, atol=2e-6, rtol=2e-5)


def test_a_rows_loss_does_not_depend_on_its_neighbours():
    network, (ids, valid) = make_network(), make_batch()
    packed = pack_rows(valid, one_row=True)
    together = packed.unpack(
        network.hidden(packed.pack(ids), seen=packed.mask(), positions=packed.position)
    )
    for row, length in enumerate(LENGTHS):
        alone = network.hidden_states(ids[row : row + 1, :length], None)[-1]
        torch.testing.assert_close(
            together[row, :length], alone[0], atol=2e-6, rtol=2e-5
        )
        assert not together[row, length:].any()


def test_rows_of_one_length_are_not_worth_it():
    _, valid = make_batch([8, 8, 8])
    assert not is_worth_packing(valid, pack_rows(valid, one_row=False))
    _, valid = make_batch()
    assert is_worth_packing(valid, pack_rows(valid, one_row=False))


@pytest.mark.parametrize("layout", ["llada", "sdar"])
def test_padding_in_the_middle_is_left_out_too(layout):
    """As of [noisy ; clean] rows, each half of which has its padding behind it."""
    network, (ids, valid) = make_network(layout), make_batch()
    halves = [torch.cat([each, each], dim=1) for each in (ids, valid)]
    at = torch.arange(34)
    how = {"positions": (at % 17)[None], "seen": (at >= 17) | (at[:, None] // 17 == 0)}
    how["seen"] = how["seen"][None]
    wanted = loss_and_gradients(network, *halves, packed=False, **how)
    found = loss_and_gradients(network, *halves, packed=True, **how)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


def test_a_row_without_tokens_takes_no_place():
    ids, valid = make_batch([3, 5])
    valid[0] = False
    for one_row in (False, True):
        packed = pack_rows(valid, one_row=one_row)
        assert packed.pack(ids).tolist() == [ids[1].tolist()]
        assert not packed.unpack(packed.pack(ids))[0].any()
    assert packed.lengths == (5,)
    with pytest.raises(ValueError, match="nothing but padding"):
        pack_rows(valid[:1], one_row=True)


@pytest.mark.parametrize("layout", ["llada", "sdar"])
def test_checkpointing_changes_no_bit(layout):
    network, (ids, valid) = make_network(layout), make_batch()
    assert not network.checkpointing
    wanted = loss_and_gradients(network, ids, valid)
    network.checkpointing = True
    calls = []
    layer = layers_of(network)[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    found = loss_and_gradients(network, ids, valid)
    torch.testing.assert_close(found, wanted, atol=0, rtol=0)
    assert len(calls) == 2, "once forwards, once backwards"


def test_xformers_segments_are_the_mask():
    """Of the bias that xformers is given; its product needs a GPU."""
    pytest.importorskip("xformers", reason="the extra `xformers` is not installed")
    _, valid = make_batch()
    packed = pack_rows(valid, one_row=True)
    bias = packed.segments().bias.materialize((sum(LENGTHS), sum(LENGTHS)))
    assert torch.equal(bias == 0, packed.mask()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xformers_computes_what_the_mask_says(dtype):
    pytest.importorskip("xformers", reason="the extra `xformers` is not installed")
    device = torch.device("cuda")
    if not attention.has_xformers(device, dtype, 64):
        pytest.skip(f"xformers has no kernel for {dtype} on this GPU")
    lengths = [70, 3, 128, 33]
    _, valid = make_batch(lengths)
    packed = pack_rows(valid.to(device), one_row=True)
    torch.manual_seed(0)
    inputs = torch.randn(3, 1, 4, sum(lengths), 64, device=device)
    weights = torch.randn(inputs.shape[1:], device=device)
    found = []
    for seen, of in ((packed.mask(), torch.float32), (packed.segments(), dtype)):
        leaves = inputs.to(of).requires_grad_()
        output = attention.attend(*leaves, seen, training=True)
        output.backward(weights.to(of))
        found.append((output.float(), leaves.grad.float()))
    exact = dtype == torch.float32
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if exact else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(found[1], found[0], **tolerance)
