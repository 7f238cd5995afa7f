# SPDX-License-Identifier: Apache-2.0
"""The reference forward against a second implementation, and the tiny checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from reference.llada import TinyLLaDA, write_random_checkpoint
from reference.procedures import factor, generate, static, threshold

PROMPT = [5, 17, 93, 2, 41, 60, 11]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyLLaDA:
    folder = tmp_path_factory.mktemp("llada")
    return TinyLLaDA.from_folder(write_random_checkpoint(folder, seed=0))


# --- The forward ---------------------------------------------------------------


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_forward_equals_transformers_llama_without_causal_mask(tmp_path, n_kv_heads):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = write_random_checkpoint(
        tmp_path, seed=1, d_model=128, n_heads=4, n_kv_heads=n_kv_heads
    )
    ours = TinyLLaDA.from_folder(folder)
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        intermediate_size=128,
        vocab_size=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    theirs = LlamaForCausalLM(config).eval()
    names = {
        "attn_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_norm": "post_attention_layernorm",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    state = {}
    for name, weight in ours.weights.items():
        parts = name.split(".")
        if "blocks" in parts:
            state[f"model.layers.{parts[3]}.{names[parts[4]]}.weight"] = weight
    outer = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    for name, theirs_name in outer.items():
        state[f"{theirs_name}.weight"] = ours.weights[
            f"model.transformer.{name}.weight"
        ]
    theirs.load_state_dict(state)

    ids = torch.randint(0, 128, (50,), generator=torch.Generator().manual_seed(0))
    everyone_sees_everyone = torch.zeros(1, 1, 50, 50)
    with torch.no_grad():
        expected = theirs(ids[None], attention_mask=everyone_sees_everyone).logits[0]
    torch.testing.assert_close(ours.forward(ids), expected, atol=1e-4, rtol=1e-4)


def test_cached_forward_equals_full_forward_when_nothing_changed(model):
    row = PROMPT + [model.mask_id] * 16
    store = model.new_store(len(row))
    full = model.forward(row, store=store)
    torch.testing.assert_close(full, model.forward(row), atol=0, rtol=0)
    for low, high in [(0, 23), (7, 23), (7, 15), (15, 23), (22, 23)]:
        part = model.forward(row[low:high], list(range(low, high)), store)
        torch.testing.assert_close(part, full[low:high], atol=1e-4, rtol=1e-4)


def test_store_rows_not_recomputed_are_seen_as_they_were(model):
    row = PROMPT + [model.mask_id] * 16
    store = model.new_store(len(row))
    model.forward(row, store=store)
    changed = [*row[:7], 33, *row[8:]]
    stale = model.forward(changed[7:15], list(range(7, 15)), store)
    fresh = model.forward(changed)[7:15]
    assert (stale - fresh).abs().max() > 1e-2

    store.truncate(15)
    cut = model.forward(changed[:15], list(range(15)), store)
    torch.testing.assert_close(cut, model.forward(changed[:15]), atol=1e-4, rtol=1e-4)


def test_store_row_never_written_shows_as_nan(model):
    store = model.new_store(4)
    assert model.forward([1, 2, 3], [0, 1, 2], store).isnan().all()


# --- The checkpoint ------------------------------------------------------------


def test_checkpoint_tokenizer(tmp_path):
    from transformers import PreTrainedTokenizerFast

    write_random_checkpoint(tmp_path, seed=0, mask_token_id=120, eos_token_id=121)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer("t5 t0 t119").input_ids == [5, 0, 119]
    assert tokenizer.decode([5, 0, 121], skip_special_tokens=True).strip() == "t5 t0"
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (120, 121)
    chat = [{"role": "user", "content": " t5 t6 "}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == [127, 125, 0, 124, 5, 6, 126, 125, 0, 124]


def test_checkpoint_depends_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_checkpoint(tmp_path / name, seed=seed)
    a, b, c = (TinyLLaDA.from_folder(tmp_path / x).weights for x in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(
        a["model.transformer.wte.weight"], c["model.transformer.wte.weight"]
    )


def test_oracle_refuses_a_config_it_does_not_implement(tmp_path):
    write_random_checkpoint(tmp_path, seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope": False}))
    with pytest.raises(ValueError, match="rope=True"):
        TinyLLaDA.from_folder(tmp_path)


class NoisyModel:
    """Adds noise well above float32 rounding, which moves a logit by under 1e-4."""

    def __init__(self, model: TinyLLaDA, noise_std: float) -> None:
        self.model, self.noise_std = model, noise_std
        self.mask_id, self.eos_id = model.mask_id, model.eos_id
        self.new_store = model.new_store
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, *arguments) -> torch.Tensor:
        logits = self.model.forward(*arguments)
        noise = torch.randn(logits.shape, generator=self.generator)
        return logits + self.noise_std * noise


@pytest.mark.parametrize("seed", [0, 1])
def test_decisions_are_eventful_and_no_near_ties(tmp_path, seed):
    folder = write_random_checkpoint(tmp_path, seed=seed)
    model = TinyLLaDA.from_folder(folder)
    seen: list[float] = []
    for rule in (static(), threshold(0.7), factor(1.0)):
        options = {"gen_length": 32, "block_length": 8, "rule": rule, "cache": "dual"}
        plain = generate(
            model,
            PROMPT,
            **options,
            eos_stop=False,
            observe=lambda view, _: seen.extend(view.confidence[view.masked].tolist()),
        )
        assert len(set(plain.tokens)) >= 5
        for other in (
            NoisyModel(model, 1e-4),
            TinyLLaDA.from_folder(folder, dtype=torch.float64),
        ):
            assert generate(other, PROMPT, **options, eos_stop=False) == plain
    assert min(seen) < 0.25 and 0.98 < max(seen) < 1 - 1e-5
