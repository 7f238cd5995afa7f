# SPDX-License-Identifier: Apache-2.0
"""Block-causal drafters: what a token sees, the folder, and an engine that loads it."""

import json

import pytest

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.loop import LoopOptions

torch = pytest.importorskip("torch")

BLOCK = 4


def tiny_network():
    from vllm_dlm.training.block_causal import make_block_causal
    from vllm_dlm.training.tiny.llada_modeling import LLaDAShape

    torch.manual_seed(0)
    shape = LLaDAShape(
        vocab_size=tokenizer.VOCAB_SIZE,
        d_model=64,
        n_layers=2,
        n_heads=2,
        mlp_hidden_size=32,
    )
    return make_block_causal(shape, BLOCK).eval()


def test_a_token_sees_its_block_and_those_left_of_it():
    network = tiny_network()
    ids = torch.randint(3, tokenizer.VOCAB_SIZE, (1, 11))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    with torch.inference_mode():
        logits = network(ids, everywhere)
        for place in range(11):
            other = ids.clone()
            other[0, place] = tokenizer.MASK_ID
            changed = (network(other, everywhere) - logits).abs().amax(-1)[0] > 1e-6
            assert changed.tolist() == [
                at // BLOCK >= place // BLOCK for at in range(11)
            ]
        # What is no place of the text is not seen, not even in the same block.
        padded = torch.cat([ids, torch.full((1, 3), 7)], dim=1)
        alone = network(padded, torch.arange(14)[None] < 11)[:, :11]
    torch.testing.assert_close(alone, logits)


def test_the_folder_is_sdars(tmp_path):
    """Its logits are those of the oracle's SDAR, which is written from the papers."""
    from reference.network import TinyModel, block_causal

    from vllm_dlm.training.block_causal import (
        export_block_causal,
        load_block_causal,
    )

    network = tiny_network()
    export_block_causal(network, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["SDARForCausalLM"]
    assert config["block_size"] == BLOCK
    assert config["mask_token_id"] == tokenizer.MASK_ID
    ids = torch.randint(3, tokenizer.VOCAB_SIZE, (13,))
    wanted = TinyModel.from_folder(tmp_path).forward(
        ids.tolist(), visible=block_causal(13, BLOCK)
    )
    with torch.inference_mode():
        for each in (network, load_block_causal(tmp_path)):
            logits = each(ids[None], torch.ones(1, 13, dtype=torch.bool))[0]
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)


def test_tied_weights_and_a_block_length_of_the_name(tmp_path):
    """As of a released SDAR: what is not in config.json is not lost."""
    from transformers import Qwen3ForCausalLM

    from vllm_dlm.training.drafters.networks import load_drafter

    fresh = tiny_network()
    config = fresh.config
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    source, goal = tmp_path / "Tiny-b8", tmp_path / "goal"
    Qwen3ForCausalLM(config).save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    file = source / "config.json"
    written = json.loads(file.read_text())
    for name in list(written):
        if name.startswith("dlm_") or name == "block_size":
            del written[name]
    written["architectures"] = ["SDARForCausalLM"]
    file.write_text(json.dumps(written))
    drafter = load_drafter(source)
    assert drafter.network.config.dlm_block_length == 8
    drafter.save(goal, like=str(source))
    assert [path.name for path in goal.glob("*.safetensors*")] == ["model.safetensors"]
    again = load_drafter(goal)
    assert again.network.config.dlm_block_length == 8
    assert again.mask_id == drafter.mask_id
    prefixes = [[5, 6, 7], [9]]
    assert again.draft(prefixes, 9) == drafter.draft(prefixes, 9)


@pytest.mark.slow
def test_it_learns_and_an_engine_drafts_with_it(tmp_path):
    from spec_decode.deer_reference import TrainedReference, speculative
    from spec_decode.harness import Engine, Rounds, params
    from training.drafter_losses import losses

    from vllm_dlm.training.drafters import deer

    options = LoopOptions(steps=6, compile_model=False, eval_steps=6)
    assert deer.train(
        tmp_path, options, attention_block=BLOCK, num_prompts=60, max_tokens=24
    )
    before, after = losses(tmp_path, BLOCK)
    assert after < before - 0.3
    engine = Engine("llama-tiny", speculative(tmp_path, masks=8))
    assert engine.drafter.context == "cached"
    rounds = Rounds(engine.drafter)
    prompts = [tokenizer.encode_prompt(f"Copy [{n}]", True) for n in ("Ada", "Ben")]
    engine.run(prompts, params(12))
    rounds.close()
    assert not engine.drafter.failed
    assert len(rounds.of) == 2
    TrainedReference(tmp_path).check(rounds)
