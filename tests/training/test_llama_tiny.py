# SPDX-License-Identifier: Apache-2.0
"""The causal models: batches, the exits' loss, the loop, and what is shipped."""

from functools import partial

import pytest

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.loop import LoopOptions
from vllm_dlm.training.tiny import llama_tiny
from vllm_dlm.training.tiny.llama_data import make_batch

torch = pytest.importorskip("torch")

from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape  # noqa: E402
from vllm_dlm.training.tiny.llama_modeling import (  # noqa: E402
    LlamaModel,
    decode_greedy,
    export_llama,
    load_llama,
)

TINY = LLaDAShape(
    vocab_size=tokenizer.VOCAB_SIZE,
    d_model=32,
    n_layers=3,
    n_heads=2,
    mlp_hidden_size=48,
    max_sequence_length=96,
)


def test_batches_depend_on_name_seed_and_step_alone():
    ids, weights = make_batch("a", 3, 1)
    again = make_batch("a", 3, 1)
    assert torch.equal(ids, again[0]) and torch.equal(weights, again[1])
    for other in (("b", 3, 1), ("a", 4, 1), ("a", 3, 2)):
        different = make_batch(*other)[0]
        assert different.shape != ids.shape or not torch.equal(different, ids)


def test_the_answers_and_their_ends_are_learnt():
    ids, weights = make_batch("a", 0, 1)
    for row, weight in zip(ids, weights, strict=True):
        learnt = row[1:][weight == 1].tolist()
        assert learnt[-1] == tokenizer.EOS_ID
        answer = learnt[:-1]
        assert answer and tokenizer.EOS_ID not in answer
        prompt_end = int((weight > 0).nonzero()[0]) + 1
        assert row[prompt_end : prompt_end + len(answer)].tolist() == answer
        padding = row[1:][(weight > 0) & (weight < 1)]
        assert (padding == tokenizer.EOS_ID).all()
        assert row[0] == tokenizer.BOS_ID


def test_loss_of_the_exits():
    torch.manual_seed(0)
    model = LlamaModel(TINY)
    ids, weights = make_batch("a", 0, 1)
    ids, weights = ids[:5], weights[:5]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.head(model(ids[:, :-1])).float()
    losses = [
        (
            torch.nn.functional.cross_entropy(
                layer.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            * weights
        ).sum()
        / weights.sum()
        for layer in logits
    ]
    loss = partial(llama_tiny.exit_loss, model, model, ids, weights)
    torch.testing.assert_close(loss(0.0), losses[-1])
    # Three layers: the first exit counts 1 / 3, the second 2 / 3.
    expected = losses[2] + 0.6 * (losses[0] / 3 + 2 * losses[1] / 3)
    torch.testing.assert_close(loss(0.6), expected)


def test_transformers_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = LlamaModel(TINY).eval()
    export_llama(model, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 100, (2, 11))
    with torch.no_grad():
        expected = other(ids, output_hidden_states=True)
        hidden = model(ids)
        torch.testing.assert_close(
            model.head(hidden[-1]), expected.logits, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            hidden[0], expected.hidden_states[1], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(load_llama(tmp_path)(ids), hidden)


def test_training_lowers_the_loss_and_resumes(tmp_path):
    """Interrupted after every kind of step, a run ends at the same weights."""
    from vllm_dlm.training.loop import prepare, run_steps

    shape = LLaDAShape(vocab_size=128, d_model=32, n_layers=1, mlp_hidden_size=32)

    def run(folder, stop_at=None):
        options = LoopOptions(
            steps=12, compile_model=False, checkpoint_minutes=0, eval_steps=6
        )
        prepare(options)
        model = LLaDAModel(shape)
        losses = []

        def step_loss(forward, step):
            if step == stop_at:
                raise KeyboardInterrupt
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 4, (4, 8), generator=generator)
            loss = torch.nn.functional.cross_entropy(
                forward(ids).flatten(0, 1), ids.flatten()
            )
            losses.append(loss.item())
            return loss

        done = run_steps(folder, options, model, step_loss, lambda step: {"all": 0.5})
        return done, model, losses

    done, whole, losses = run(tmp_path / "whole")
    assert done and losses[-1] < losses[0]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=5)
    done, resumed, rest = run(tmp_path / "parts")
    assert done and len(rest) == 7
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="has seed 1, not 2"):
        run_steps(
            tmp_path / "parts", LoopOptions(steps=12, seed=2), whole, None, lambda s: {}
        )


@pytest.mark.slow
def test_the_command_learns_and_writes_a_folder(tmp_path):
    options = LoopOptions(steps=15, compile_model=False, eval_steps=15)
    assert llama_tiny.train(tmp_path, options, name="test", shape=TINY, exit_weight=0.5)
    model = load_llama(tmp_path)
    torch.manual_seed(options.seed)
    fresh = LlamaModel(TINY)
    ids, weights = make_batch("test", 1000, 1)
    with torch.no_grad():
        before, after = (
            llama_tiny.exit_loss(m, m, ids, weights, 0.5).item() for m in (fresh, model)
        )
    assert after < before - 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"steps": 0}, "steps must be above 0"), ({"threads": -1}, "threads must be")],
)
def test_options_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        LoopOptions(**{"steps": 1, **fields})
    with pytest.raises(ValueError, match="exit_weight must be 0 or more"):
        llama_tiny.train(
            "unused", LoopOptions(steps=1), name="a", shape=TINY, exit_weight=-1
        )


@pytest.fixture(scope="module")
def shipped():
    from vllm_dlm.config.aliases import resolve

    return {
        name: load_llama(resolve(name)) for name in ("llama-tiny", "llama-tiny-draft")
    }


@pytest.mark.slow  # Of weights that do not change.
def test_the_shipped_models_answer_held_out_problems(shipped):
    from vllm_dlm.tasks.evaluation import exact_match

    shares = {}
    for name, model in shipped.items():
        decode = partial(
            decode_greedy, model, max_tokens=24, exit_layer=model.shape.n_layers
        )
        shares[name] = exact_match(decode, 44, seed=77)["all"]
    assert shares["llama-tiny"] >= 0.9
    assert 0.3 <= shares["llama-tiny-draft"] < shares["llama-tiny"]


@pytest.mark.slow  # Of weights that do not change.
def test_the_exits_agree_more_the_higher_they_are(shipped):
    from vllm_dlm.tasks.problems import sample_problems
    from vllm_dlm.training.tiny.llama_card import exit_agreement

    model = shipped["llama-tiny"]
    prompts = [
        tokenizer.encode_prompt(problem.question, chat=False)
        for problem in sample_problems(40, 78, "heldout")
    ]
    answers = [
        tokenizer.encode(tokenizer.decode(answer)) + [tokenizer.EOS_ID]
        for answer in decode_greedy(model, prompts, max_tokens=24, exit_layer=8)
    ]
    agreement = exit_agreement(model, prompts, answers)
    assert agreement[-1] == 1.0
    assert agreement[-2] > 0.95
    assert agreement[0] < agreement[3] < agreement[6]
