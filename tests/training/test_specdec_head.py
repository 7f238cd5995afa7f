# SPDX-License-Identifier: Apache-2.0
"""Data, loss and training of acceptance heads."""

import math

import pytest

from vllm_dlm.training.drafters import specdec_data, specdec_fit, specdec_head
from vllm_dlm.training.drafters.teacher import Answered

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_labels():
    target = torch.tensor([[0.5, 0.3, 0.2]]).expand(6000, -1)
    draft = torch.tensor([[0.2, 0.6, 0.2]]).expand(6000, -1)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = specdec_data.label_tokens(target, draft, generator)
    expected = torch.tensor([1.0, 0.5, 1.0])
    torch.testing.assert_close(labels, expected[tokens])
    # The sum of min(p, q) is .7.
    assert labels.mean().item() == pytest.approx(0.7, abs=0.02)
    shares = tokens.bincount() / len(tokens)
    torch.testing.assert_close(shares, draft[0], atol=0.02, rtol=0)


def test_distributions():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert specdec_data.distribution(logits, 0).tolist() == [0, 1, 0]
    torch.testing.assert_close(
        specdec_data.distribution(logits, 2.0), (logits / 2).softmax(0)
    )


def test_loss():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    labels = torch.tensor([0.8, 0.0])
    # Accept probabilities 3/4 and 1/2; a rejection weighs 6.
    first = -(6 * 0.2 * math.log(0.25) + 0.8 * math.log(0.75))
    second = -6 * math.log(0.5)
    loss = specdec_fit.head_loss(logits, labels, 6.0, "tokens").item()
    assert loss == pytest.approx((first + second) / 2, rel=1e-5)
    # Weights 6 * 0.2 + 0.8 and 6.
    loss = specdec_fit.head_loss(logits, labels, 6.0, "weights").item()
    assert loss == pytest.approx((first + second) / (2 + 6), rel=1e-5)


@pytest.mark.parametrize(
    ("hidden_size", "rate"), [(32, 4e-3), (1024, 2e-4), (4096, 5e-5), (8192, 2.5e-5)]
)
def test_the_learning_rate_of_a_width(hidden_size, rate):
    assert specdec_fit.default_learning_rate(hidden_size) == pytest.approx(rate)


@pytest.fixture(scope="module")
def models():
    from vllm_dlm.training.drafters.teacher import load_causal_lm

    return load_causal_lm("llama-tiny"), load_causal_lm("llama-tiny-draft")


@pytest.fixture(scope="module")
def answered(models):
    from vllm_dlm.training.drafters.teacher import (
        generate_answers,
        load_prompts,
        load_tokenizer,
    )

    prompts = load_prompts(None, load_tokenizer("llama-tiny"), 48, 5)
    return generate_answers(models[0], prompts, max_tokens=16, temperature=1.0, seed=5)


def collect(models, answered, **changes):
    settings = {"temperature": 1.0, "mixing_ratio": 0.15, "seed": 3, **changes}
    return specdec_data.make_sequences(*models, answered, **settings)


def test_each_label_is_of_the_targets_own_prefix(models, answered):
    few = Answered(answered.prompts[:6], answered.answers[:6])
    sequences = collect(models, few, mixing_ratio=0.0)
    for sequence, prompt, answer in zip(
        sequences, few.prompts, few.answers, strict=True
    ):
        assert len(sequence.tokens) == len(sequence.labels) == len(prompt + answer)
        assert sequence.tokens[: len(prompt)] == prompt
        assert set(sequence.labels[: len(prompt)]) == {-1.0}
        for place in range(len(answer)):
            prefix = torch.tensor([prompt + answer[:place]])
            with torch.no_grad():
                p, q = (model(prefix).logits[0, -1].softmax(-1) for model in models)
            token = sequence.tokens[len(prompt) + place]
            expected = min(1.0, (p[token] / q[token]).item())
            label = sequence.labels[len(prompt) + place]
            assert label == pytest.approx(expected, abs=2e-3)


def test_mixing_keeps_some_of_the_targets_tokens(models, answered):
    sequences = collect(models, answered, mixing_ratio=0.4)
    again = collect(models, answered, mixing_ratio=0.4)
    assert sequences == again
    kept = total = 0
    for sequence, prompt, answer in zip(
        sequences, answered.prompts, answered.answers, strict=True
    ):
        labels = sequence.labels[len(prompt) :]
        for token, label, own in zip(
            sequence.tokens[len(prompt) :], labels, answer, strict=True
        ):
            total += 1
            kept += label < 0
            assert label >= 0 or token == own
    assert kept / total == pytest.approx(0.4, abs=0.06)


def test_the_state_at_a_token_judges_that_token(models):
    draft = models[1]
    sequence = specdec_data.Sequence([1, 20, 30, 40], [-1.0, -1.0, 0.25, 0.75])
    longer = specdec_data.Sequence([1, 20, 30, 40, 50, 60], [-1.0] * 5 + [1.0])
    hidden, labels = specdec_data.hidden_states(draft, [sequence, longer])
    assert labels.tolist() == [0.25, 0.75, 1.0]
    with torch.no_grad():
        states = draft.base_model(torch.tensor([longer.tokens])).last_hidden_state[0]
    torch.testing.assert_close(hidden, states[[2, 3, 5]], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_beats_a_constant_verdict(models, answered):
    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

    sequences = collect(models, answered)
    head = specdec_fit.train_head(models[1], sequences, epochs=12)
    quality = specdec_fit.measure_head(head, models[1], sequences)
    assert quality.loss < 0.9 * quality.constant_loss
    torch.manual_seed(1)
    fresh = AcceptanceHead(models[1].config.hidden_size)
    untrained = specdec_fit.measure_head(fresh, models[1], sequences)
    assert untrained.loss > quality.loss
    assert 0 < quality.mean_label < 1


def test_a_block_that_is_shared_is_trained_as_one(models, answered):
    sequences = collect(models, Answered(answered.prompts[:8], answered.answers[:8]))
    head = specdec_fit.train_head(models[1], sequences, epochs=2, blocks="shared")
    assert len(head.blocks) == 3 and len(set(head.blocks)) == 1
    assert len(list(head.parameters())) == 4


def test_the_loss_that_is_asked_for_is_trained(models, answered):
    """Batches of two sequences: how they count beside each other differs."""
    sequences = collect(models, Answered(answered.prompts[:8], answered.answers[:8]))

    def trained(loss_mean):
        head = specdec_fit.train_head(
            models[1], sequences, epochs=1, batch_rows=2, loss_mean=loss_mean
        )
        return head.output.weight

    assert torch.equal(trained("tokens"), trained("tokens"))
    assert not torch.allclose(trained("tokens"), trained("weights"))


def test_the_command_writes_a_head(tmp_path):
    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Copy [Ada, Ben, Carl]\nSort [Dan, Ada]\nAdd 12+34\n" * 4)
    specdec_head.train(
        target="llama-tiny",
        draft="llama-tiny-draft",
        output=tmp_path,
        prompts=prompts,
        max_tokens=24,
        epochs=1,
        loss_mean="weights",
        blocks="shared",
    )
    head = AcceptanceHead.load(tmp_path, hidden_size=96)
    assert head.about["target"] == "llama-tiny"
    assert head.about["temperature"] == "1.0"
    assert head.about["loss_mean"] == "weights"
    assert head.about["learning_rate"] == "0.00213"
    # One block three times, which a file holds three times.
    first, *others = [block.weight for block in head.blocks]
    assert len(others) == 2 and all(torch.equal(first, other) for other in others)
    card = next(tmp_path.rglob("README.md")).read_text()
    assert "12 prompts (prompts.txt)" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing_ratio": 1.0}, "mixing_ratio must be from 0 to below 1"),
        ({"reject_weight": 0}, "reject_weight must be above 0"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"loss_mean": "sum"}, "loss_mean must be weights or tokens, not 'sum'"),
        ({"blocks": "two"}, "blocks must be separate or shared, not 'two'"),
        ({"num_prompts": 1}, "num_prompts must be at least 2"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"draft": "llada-tiny"}, "is not an autoregressive model"),
    ],
)
def test_refusals(tmp_path, changes, message):
    settings = {"target": "llama-tiny", "draft": "llama-tiny-draft"}
    with pytest.raises(ValueError, match=message):
        specdec_head.train(output=tmp_path, **{**settings, **changes})


@pytest.mark.slow  # Of weights that do not change.
def test_the_shipped_head_knows_its_draft_model(models, answered):
    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead

    head = AcceptanceHead.load(resolve("llama-tiny-draft"), hidden_size=96)
    sequences = collect(models, answered)
    quality = specdec_fit.measure_head(head, models[1], sequences)
    assert quality.loss < 0.8 * quality.constant_loss
    assert quality.ranking > 0.75
