# SPDX-License-Identifier: Apache-2.0
"""Consistency distillation: masks, its teacher, and a loss that is computed again."""

import json
import math

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import step_generator

torch = pytest.importorskip("torch")

from training.distillation_cases import (  # noqa: E402
    END,
    MASK,
    batch_of,
    learner_of,
    training_of,
)

from vllm_dlm.training.recipes import (  # noqa: E402
    dscd,
)


@pytest.mark.parametrize(
    ("length", "student", "factor", "counts"),
    [
        (8, 0.4, 0.3, (2, 1)),
        (8, 0.9, 0.7, (2, 1)),
        (2, 0.9, 0.7, (2, 1)),
        (1, 0.9, 0.7, (1, 1)),
        (100, 0.6, 0.5, (60, 30)),
        (100, 0.9, 0.7, (90, 60)),
        # The teacher's share follows from the student's behind the cap.
        (15, 0.8, 0.5, (7, 3)),
    ],
)
def test_numbers_of_masks(length, student, factor, counts):
    shares = dscd.ratios(length, student, factor)
    assert dscd.mask_counts(length, *shares) == counts


def test_published_and_uncapped_numbers_of_masks():
    # As published the teacher's share comes from the student's in front of the cap.
    assert dscd.mask_counts(15, 0.5, 0.4) == (7, 6)
    assert dscd.ratios(15, 0.8, 0.5, short_caps=False) == (0.8, 0.4)
    assert dscd.mask_counts(15, 0.8, 0.4, short_caps=False) == (12, 6)
    assert dscd.mask_counts(8, 0.9, 0.6, short_caps=False) == (7, 4)
    assert dscd.mask_counts(3, 0.4, 0.1, short_caps=False) == (2, 0)


@pytest.mark.parametrize("short_caps", [True, False])
def test_the_teacher_sees_a_part_of_the_student_s_masks(short_caps):
    batch = batch_of([1, 2, 5, 10, 11, 15, 19, 20, 40, 48], 48)
    ends = (batch.ids == END) & batch.response
    answer = batch.response & (ends.cumsum(1) - ends.long() == 0)
    fewer = 0
    for step in range(100):
        example = dscd.corrupt(
            batch, MASK, END, step_generator(1, step), short_caps=short_caps
        )
        student, teacher = (
            (each == MASK) & answer for each in (example.inputs, example.teacher_inputs)
        )
        assert torch.equal(student, example.targets)
        assert not (teacher & ~student).any()
        fewer += int((teacher.sum(1) < student.sum(1)).sum())
        behind = batch.response & ~answer
        assert (example.inputs[behind] == MASK).all()
        assert (example.teacher_inputs[behind] == MASK).all()
        prompt = batch.valid & ~batch.response
        assert torch.equal(example.inputs[prompt], batch.ids[prompt])
    assert fewer >= 850


def test_loss_of_one_token():
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    assert dscd.divergences(student, teacher).item() == pytest.approx(0.10538, abs=5e-6)
    token, row = torch.tensor([0]), torch.tensor([0])
    for clamp_tokens in (False, True):
        losses, bitten = dscd.loss(
            student, teacher, token, row, 1, share=0.9, clamp_tokens=clamp_tokens
        )
        assert losses.item() == pytest.approx(0.12617, abs=5e-6)
        assert bitten.item() == 0
    losses, _ = dscd.loss(student, teacher, token, row, 1, share=0.0)
    assert losses.item() == pytest.approx(0.31326, abs=5e-6)


def test_beyond_the_bound_there_is_no_gradient():
    student = torch.tensor([[0.0, 30.0], [0.0, 30.0], [0.0, 1.0]], requires_grad=True)
    teacher, tokens = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    rows = torch.tensor([0, 0, 1])
    losses, bitten = dscd.loss(student, teacher, tokens, rows, 2, share=0.5)
    losses.sum().backward()
    assert losses[0].item() == 5 and bitten.tolist() == [1, 0]
    assert not student.grad[:2].any() and student.grad[2].any()
    student.grad = None
    losses, bitten = dscd.loss(
        student, teacher, tokens, rows, 2, share=0.5, clamp_tokens=True
    )
    losses.sum().backward()
    # Bounded by 20: the cross-entropy is 30, T² KL about 4 x 6.8.
    assert losses[0].item() == 20 and bitten.tolist() == [1, 0]


def test_share_of_the_divergence():
    places = (0, 0.0999, 0.325, 0.55, 0.775, 1)
    wanted = (0.9, 0.9, 0.8414, 0.7, 0.5586, 0.5)
    found = tuple(dscd.share_of_divergence(place) for place in places)
    assert found == pytest.approx(wanted, abs=5e-5)


def test_distillation_is_the_naive_loss(tmp_path):
    learner, teacher = learner_of(tmp_path / "a"), learner_of(tmp_path / "b")
    for parameter in teacher.network.parameters():
        parameter.data *= 1.1
    batch = batch_of([5, 12, 24], 24)
    example = dscd.corrupt(batch, MASK, END, step_generator(4, 0), short_caps=False)
    where = example.targets
    with torch.no_grad():
        losses, _ = dscd.loss(
            learner.logits_at(example.inputs, example.valid, where),
            teacher.logits_at(example.teacher_inputs, example.valid, where),
            example.ids[where],
            where.nonzero()[:, 0],
            3,
            share=0.8,
        )
        for row in range(3):
            length = int(batch.valid[row].sum())
            given = learner.network(example.inputs[row, None, :length])[0]
            wanted = teacher.network(example.teacher_inputs[row, None, :length])[0]
            kl, ce, count = 0.0, 0.0, 0
            for place in range(length):
                if not where[row, place]:
                    continue
                count += 1
                p = [math.exp(v / 2) for v in given[place].tolist()]
                q = [math.exp(v / 2) for v in wanted[place].tolist()]
                p, q = ([v / sum(each) for v in each] for each in (p, q))
                kl += 4 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
                one = [math.exp(v) for v in given[place].tolist()]
                ce -= math.log(one[int(batch.ids[row, place])] / sum(one))
            naive = 0.8 * min(kl / count, 5) + 0.2 * min(ce / count, 5)
            assert float(losses[row]) == pytest.approx(naive, rel=1e-4)


@pytest.mark.parametrize("adapter", [(), ("--lora-rank", "2", "--lora-dropout", "0.5")])
def test_the_teacher_is_the_model_before_the_training(tmp_path, adapter):
    training = training_of(tmp_path, dscd, *adapter)
    learner, batch = training.learner, training.batch(0)
    where = batch.response

    def logits(one):
        with torch.no_grad():
            return one.logits_at(batch.ids, batch.valid, where)

    learner.network.eval()
    before = logits(learner)
    learner.network.train()
    with training.initial() as teacher:
        torch.testing.assert_close(logits(teacher), before)
    # The same network and the same masks: nothing to learn.
    assert float(dscd.divergences(before, before).abs().max()) < 1e-5
    with torch.no_grad():
        for parameter in learner.network.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    with training.initial() as teacher:
        torch.testing.assert_close(logits(teacher), before)
    assert not torch.allclose(logits(learner), before)
    assert learner.network.training


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    options = ["llada-tiny", "--output-dir", str(tmp_path), "--steps", "50"]
    options += ["--num-rows", "500", "--short-caps", "off", "--batch-size", "16"]
    options += ["--learning-rate", "3e-4", "--threads", "1", "--num-problems", "0"]
    assert main(["train", "dscd", *options]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
