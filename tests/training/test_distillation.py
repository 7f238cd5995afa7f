# SPDX-License-Identifier: Apache-2.0
"""Certainty forcing, consistency distillation and pseudo-trajectories: masks, losses.

Each loss is computed a second time here, position by position.
"""

import json
import math

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import Row, lay_out, split_rows, step_generator, task_rows

torch = pytest.importorskip("torch")

from vllm_dlm.training.recipes import (  # noqa: E402
    certainty,
    d3llm,
    dscd,
    self_made,
    two_ways,
)

END, MASK = 0, 2


def batch_of(lengths, canvas, prompt=3):
    """Rows whose answers have so many tokens, their end included."""
    rows = [
        Row([1, *range(10, 9 + prompt + index % 2)], [*range(20, 19 + length), END])
        for index, length in enumerate(lengths)
    ]
    return lay_out(rows, end_id=END, canvas_length=canvas)


def learner_of(folder, **options):
    from training.tiny_learner import tiny_learner

    learner = tiny_learner(folder, **options)
    learner.network.eval()
    return learner


def entropy_of(logits, temperature):
    scaled = [value / temperature for value in logits]
    total = sum(math.exp(value) for value in scaled)
    shares = [math.exp(value) / total for value in scaled]
    return -sum(share * math.log(share) for share in shares if share > 0)


# -- certainty forcing -----------------------------------------------------


def test_entropy():
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    assert two_ways.entropy(logits, 0.5).item() == pytest.approx(0.17732, abs=5e-6)
    assert two_ways.entropy(logits, 1.0).item() == pytest.approx(0.66557, abs=5e-6)
    uniform = torch.zeros(1, 7)
    assert two_ways.entropy(uniform, 0.5).item() == pytest.approx(math.log(7))
    # A probability of 0 has no logarithm, and takes no part.
    certain = torch.tensor([[400.0, 0.0, 0.0]], requires_grad=True)
    two_ways.entropy(certain, 0.5).sum().backward()
    assert torch.isfinite(certain.grad).all()


def test_both_ways_share_out_the_active_block():
    batch = batch_of([60, 10, 33, 64], 64)
    seen = [set() for _ in range(4)]
    differing = 0
    for step in range(40):
        generator = step_generator(1, step)
        blocks = certainty.draw_blocks(batch, 32, END, generator)
        inputs, targets = certainty.corrupt(batch, blocks, 32, MASK, generator)
        differing += len(set(blocks.tolist())) > 1
        for row, block in enumerate(blocks.tolist()):
            seen[row].add(block)
            begin = int(batch.prompt_lengths[row]) + 32 * block
            active = torch.zeros(len(batch.ids[row]), dtype=torch.bool)
            active[begin : begin + 32] = True
            assert not (targets[row, 0] & targets[row, 1]).any()
            assert torch.equal(targets[row].any(0), active)
            for way in (0, 1):
                is_mask = inputs[row, way] == MASK
                right = batch.valid[row].clone()
                right[: begin + 32] = False
                assert torch.equal(is_mask, targets[row, way] | right)
                assert torch.equal(inputs[row, way][~is_mask], batch.ids[row][~is_mask])
    assert seen == [{0, 1}] * 4 and differing


def test_the_last_block_may_be_short_and_is_never_empty():
    batch = batch_of([5] * 200, 40)
    blocks = certainty.draw_blocks(batch, 16, END, step_generator(1, 0))
    assert set(blocks.tolist()) == {0, 1, 2}
    _, targets = certainty.corrupt(batch, blocks, 16, MASK, step_generator(1, 1))
    sizes = targets.any(1).sum(1)
    assert {*zip(blocks.tolist(), sizes.tolist(), strict=True)} == {
        (0, 16),
        (1, 16),
        (2, 8),
    }
    assert set(
        certainty.draw_blocks(batch, 64, END, step_generator(1, 0)).tolist()
    ) == {0}


def test_blocks_of_padding_and_the_first_block():
    batch = batch_of([20] * 4000, 64)

    def shares(**options):
        blocks = certainty.draw_blocks(batch, 16, END, step_generator(2, 0), **options)
        return [float((blocks == number).float().mean()) for number in range(4)]

    assert shares() == pytest.approx([0.25] * 4, abs=0.03)
    # Of 4 blocks, the text has two.
    wanted = [1 / 2.4, 1 / 2.4, 0.2 / 2.4, 0.2 / 2.4]
    assert shares(padding_share=0.2) == pytest.approx(wanted, abs=0.03)
    assert shares(padding_share=0.0)[2:] == [0, 0]
    found = shares(padding_share=0.0, first_share=0.8)
    assert found == pytest.approx([0.9, 0.1, 0, 0], abs=0.03)


def test_blocks_of_a_block_causal_model_begin_at_its_first_token():
    batch = batch_of([5] * 100, 8, prompt=6)
    before = certainty.tokens_before(batch, 4)
    assert certainty.tokens_before(batch, None) == 0
    assert before.tolist() == [2, 3] * 50
    blocks = certainty.draw_blocks(batch, 4, END, step_generator(1, 0), before=before)
    assert set(blocks.tolist()) == {0, 1, 2}
    _, targets = certainty.corrupt(
        batch, blocks, 4, MASK, step_generator(1, 1), before=before
    )
    for row, block in enumerate(blocks.tolist()):
        places = targets[row].any(0).nonzero()[:, 0]
        assert set((places // 4).tolist()) == {block + 1}


def test_mask_ratios():
    batch = batch_of([5] * 300, 32)
    blocks = torch.zeros(300, dtype=torch.int64)

    def counts(**options):
        _, targets = certainty.corrupt(
            batch, blocks, 32, MASK, step_generator(3, 0), **options
        )
        return targets.sum(-1)

    assert counts()[:, 0].float().mean() == pytest.approx(0.5005 * 32, abs=0.6)
    wide = counts(ratio=(0.0, 1.0))[:, 0]
    assert wide.min() < 4 and wide.max() > 28
    full = counts(full_share=1.0)
    assert (full[:, 0] == 32).all() and (full[:, 1] == 0).all()


def example_of(batch, block_length=16, step=0, weight=1.0):
    generator = step_generator(5, step)
    blocks = certainty.draw_blocks(batch, block_length, END, generator)
    inputs, targets = certainty.corrupt(batch, blocks, block_length, MASK, generator)
    weights = two_ways.padding_weights(batch, END, weight)
    return two_ways.Example(batch.ids, inputs, targets, batch.valid, weights)


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_certainty_is_the_naive_loss(tmp_path, weight):
    learner = learner_of(tmp_path)
    # Often right, so that there is an entropy: tokens repeat what the network says.
    batch = lay_out(task_rows(5, 1), end_id=END, canvas_length=24)
    example = example_of(batch, weight=weight)
    with torch.no_grad():
        for way in (0, 1):
            where = example.targets[:, way]
            said = learner.logits_at(example.inputs[:, way], batch.valid, where)
            taken = torch.rand(len(said), generator=step_generator(0, way)) < 0.5
            ids = example.ids[where]
            example.ids[where] = torch.where(taken, said.argmax(-1), ids)
        missed, unsure = two_ways.forward(learner, example, 0.5)
        found = certainty.loss(missed, unsure, 0.7)
        other = d3llm.loss(missed, unsure)
        unsure_rows = 0
        for row in range(5):
            parts = []
            for way in (0, 1):
                length = int(batch.valid[row].sum())
                logits = learner.network(example.inputs[row, way, None, :length])[0]
                sums = {"ce": [0.0, 0.0], "h": [0.0, 0.0]}
                for place in range(length):
                    if not example.targets[row, way, place]:
                        continue
                    token = int(example.ids[row, place])
                    share = float(example.weights[row, place])
                    values = logits[place].tolist()
                    top = max(values)
                    norm = top + math.log(sum(math.exp(v - top) for v in values))
                    sums["ce"][0] += share * (norm - values[token])
                    sums["ce"][1] += share
                    if values.index(top) == token:
                        sums["h"][0] += share * entropy_of(values, 0.5)
                        sums["h"][1] += share
                parts.append(
                    [total / size if size else 0.0 for total, size in sums.values()]
                )
            (ce_1, h_1), (ce_2, h_2) = parts
            unsure_rows += h_1 > 0 and h_2 > 0
            wanted = ce_1 + ce_2 + 0.7 * (h_1 + h_2)
            assert float(found[row]) == pytest.approx(wanted, rel=1e-4)
            wanted = (ce_1 + ce_2 + 2 * h_1) / 4
            assert float(other[row]) == pytest.approx(wanted, rel=1e-4)
    assert unsure_rows >= 3


def test_without_an_entropy_it_is_fine_tuning_at_half_the_masks(tmp_path):
    """The whole canvas as the active block: sft's cross-entropy without weights."""
    learner = learner_of(tmp_path)
    batch = lay_out(task_rows(4, 1), end_id=END, canvas_length=20)
    example = example_of(batch, block_length=20)
    with torch.no_grad():
        missed, unsure = two_ways.forward(learner, example, 0.5)
        logits = learner.network(example.inputs[:, 0], batch.valid)
    loss = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch.ids, reduction="none"
    )
    where = example.targets[:, 0]
    wanted = (loss * where).sum(1) / where.sum(1)
    torch.testing.assert_close(missed[:, 0], wanted)
    torch.testing.assert_close(certainty.loss(missed, unsure, 0.0), missed.sum(1))


# -- consistency distillation ----------------------------------------------


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


def training_of(folder, recipe, *more):
    """What a command begins with, before its first step."""
    import argparse

    from training.tiny_learner import tiny_folder

    from vllm_dlm.training.recipes.command import start

    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser)
    model = str(tiny_folder(folder / "model"))
    data = write_rows(folder / "rows.jsonl")
    args = [
        model,
        "--output-dir",
        str(folder / "out"),
        "--data",
        str(data),
        "--num-problems",
        "0",
    ]
    return start(recipe.RECIPE, parser.parse_args([*args, *more]))


def write_rows(path, count=30):
    lines = [
        json.dumps({"prompt_ids": row.prompt_ids, "response_ids": row.response_ids})
        for row in task_rows(count, 3)
    ]
    path.write_text("\n".join(lines))
    return path


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


# -- pseudo-trajectories ---------------------------------------------------


def test_blocks_and_ratios_grow():
    sizes = [d3llm.block_length(step / 60) for step in range(60)]
    assert sizes == sorted(sizes)
    assert [sizes[step] for step in (0, 9, 10, 15, 20, 29, 30, 35, 40, 59)] == [
        *(16, 16, 16, 20, 24, 24, 24, 28, 32, 32)
    ]
    assert d3llm.block_length(0.999, [4]) == 4
    assert (d3llm.smallest_ratio(0), d3llm.smallest_ratio(0.5)) == (0, 0.4)


def test_masks_are_those_of_a_canvas_on_the_way():
    rows = [
        d3llm.TrajectoryRow([1, 10], [21, 22, 23, 24, END], [3, 0, 1, 4, 2]),
        d3llm.TrajectoryRow([1, 10, 11], [21, END], [1, 0]),
    ]
    batch = lay_out(rows, end_id=END, canvas_length=8)
    ranks = d3llm.ranks_of(rows, batch)
    assert ranks[0, 2:10].tolist() == [3, 0, 1, 4, 2, 5, 6, 7]
    assert ranks[1, 3:11].tolist() == [1, 0, 2, 3, 4, 5, 6, 7]
    seen = set()
    for step in range(60):
        # The least ratio is the largest: t is 0.8, and 8 - 0.8 x 8 is written.
        inputs, targets = d3llm.corrupt(
            batch, ranks, 8, 0.8, MASK, step_generator(1, step)
        )
        assert (
            targets[0, 0, 2:10].tolist() == [True, False, True, True, True] + [True] * 3
        )
        assert targets[0, 1, 2:10].tolist() == [False, True] + [False] * 6
        inputs, targets = d3llm.corrupt(
            batch, ranks, 4, 0.0, MASK, step_generator(2, step)
        )
        for row, start in enumerate(batch.prompt_lengths.tolist()):
            active = targets[row].any(0)
            first = int(active.int().argmax())
            assert active.sum() == 4 and (first - start) % 4 == 0
            assert not (targets[row, 0] & targets[row, 1]).any()
            assert (inputs[row, :, first + 4 : start + 8] == MASK).all()
            assert torch.equal(inputs[row, 0, :first], batch.ids[row, :first])
            order = ranks[row, active].tolist()
            masked = targets[row, 0, active].tolist()
            # Some number of tokens is written, and those are the first ones.
            late = min(
                rank for rank, is_mask in zip(order, masked, strict=True) if is_mask
            )
            if all(m == (r >= late) for r, m in zip(order, masked, strict=True)):
                seen.add((row, first - start, sum(masked)))
    assert len(seen) > 8


def test_rows_without_a_trajectory_have_random_masks():
    batch = batch_of([5] * 200, 16)
    ranks = d3llm.ranks_of([Row([1], [2])] * 200, batch)
    assert (ranks == -1).all()
    _, targets = d3llm.corrupt(batch, ranks, 16, 0.8, MASK, step_generator(1, 0))
    share = targets[:, 0].sum() / targets.any(1).sum()
    assert float(share) == pytest.approx(0.8, abs=0.03)


def test_a_log_s_requests_are_rows(tmp_path):
    lines = [
        {"request": "a", "prompt": [1, 10], "mask": MASK},
        {"request": "a", "block": [0, 4], "step": 0, "writes": [[1, 31], [3, END]]},
        {"request": "b", "prompt": [1, 11], "mask": MASK},
        {"request": "a", "block": [0, 4], "step": 1, "writes": [[0, 30], [1, 41]]},
        {"request": "b", "block": [0, 4], "step": 0, "writes": [[2, 31]]},
        {"request": "a", "block": [0, 4], "step": 2, "writes": [[2, END]]},
    ]
    file = tmp_path / "trajectories-1.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # What is behind the end is no part of a response; b has not ended.
    assert d3llm.read_log(tmp_path, END) == [
        d3llm.TrajectoryRow([1, 10], [30, 41, END], [1, 1, 2])
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[2:3]))
    with pytest.raises(ValueError, match="no request whose text is finished"):
        d3llm.read_log(tmp_path, END)


# -- the recipes -----------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        (certainty, ("--block-length", "16", "--full-mask", "0.3")),
        (dscd, ("--short-caps", "off")),
        (dscd, ("--lora-rank", "2", "--clamp", "token")),
    ],
)
def test_a_batch_s_loss_is_that_of_its_rows_alone(tmp_path, recipe, more):
    training = training_of(tmp_path, recipe, "--batch-size", "6", *more)
    training.learner.network.eval()
    batch = training.batch(1)
    assert len(set(batch.prompt_lengths.tolist())) > 1
    made = recipe.RECIPE
    example = made.corrupt(training, batch, training.generator(1), 1)
    whole = made.step_loss(training, example, 1)
    for parts in (2, 6):
        alone = sum(
            made.step_loss(training, part, 1) for part in split_rows(example, 6, parts)
        )
        torch.testing.assert_close(alone, whole)
    # Nor does it matter what lies behind a row.
    example.inputs[
        ~batch.valid.view(6, *[1] * (example.inputs.dim() - 2), -1).expand_as(
            example.inputs
        )
    ] = 77
    torch.testing.assert_close(made.step_loss(training, example, 1), whole)


def options_of(recipe, folder, data, output, *more):
    return [
        *("train", recipe, str(folder), "--output-dir", str(output)),
        *("--steps", "3", "--batch-size", "4", "--data", str(data)),
        *("--num-problems", "0", *more),
    ]


def test_a_block_causal_model_learns_to_be_certain(tmp_path):
    from training.tiny_learner import tiny_folder

    folder = tiny_folder(tmp_path / "model", "sdar")
    data = write_rows(tmp_path / "rows.jsonl")
    assert main(options_of("certainty", folder, data, tmp_path / "out")) == 0


@pytest.mark.parametrize("recipe", ["certainty", "dscd", "d3llm"])
def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, recipe):
    from training.tiny_learner import tiny_folder

    from vllm_dlm.files.model_folders import read_weights

    folder = tiny_folder(tmp_path / "model")
    if recipe == "d3llm":
        data = tmp_path / "trajectories-1.jsonl"
        with data.open("w") as file:
            for number, row in enumerate(task_rows(20, 3)):
                first = {"request": str(number), "prompt": row.prompt_ids, "mask": MASK}
                writes = [list(pair) for pair in enumerate(row.response_ids)]
                block = {"request": str(number), "block": [0, len(writes)]}
                file.write(json.dumps(first) + "\n")
                for step, write in enumerate(writes[::-1]):
                    line = block | {"step": step, "writes": [write]}
                    file.write(json.dumps(line) + "\n")
    else:
        data = write_rows(tmp_path / "rows.jsonl")
    assert main(options_of(recipe, folder, data, tmp_path / "whole")) == 0
    stopped = options_of(recipe, folder, data, tmp_path / "parts")
    for _ in range(3):  # each run stops after one step
        assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    before, whole, parts = (
        read_weights(tmp_path / name / "model.safetensors")
        for name in ("model", "whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("certainty", ("--mask-ratio", "0.9", "0.1"), "expected 0 <= LOW <= HIGH <= 1"),
        ("certainty", ("--full-mask", "2"), "--full-mask is at least 0 and at most 1"),
        ("certainty", ("--beta", "-1"), "--beta is at least 0, not -1"),
        ("certainty", ("--certainty-temperature", "0"), "is at least 0.001"),
        ("d3llm", ("--padding-weight", "-1"), "--padding-weight is at least 0"),
        ("dscd", ("--threshold", "3"), "--threshold is at least"),
        ("certainty", ("--rounds", "2"), "--rounds is for data that the network makes"),
        ("certainty", ("--free-share", "0.5"), "--free-share is for data that"),
        ("certainty", ("--rounds", "4"), "--rounds 4 are more than the 3 steps"),
        ("sdar certainty", ("--block-length", "8"), "has blocks of 4 tokens"),
        ("sdar dscd", (), "is block-causal"),
        ("sdar d3llm", (), "is block-causal"),
    ],
)
def test_refusals(tmp_path, capsys, recipe, more, message):
    from training.tiny_learner import tiny_folder

    data = write_rows(tmp_path / "rows.jsonl")
    *layout, recipe = recipe.split()
    folder = tiny_folder(tmp_path / "model", *layout)
    assert main(options_of(recipe, folder, data, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err


def test_the_network_makes_its_own_data(tmp_path):
    import argparse

    from vllm_dlm.training.answer_log import read_answers
    from vllm_dlm.training.learner import load_learner
    from vllm_dlm.training.reinforcement.rollouts import Decoder

    learner = load_learner("llada-tiny")
    args = argparse.Namespace(
        model="llada-tiny",
        output_dir=tmp_path,
        num_rows=70,
        seed=1,
        free_share=0.5,
        canvas_length=None,
        resume=True,
        data=None,
    )
    decoder = Decoder("threshold", {"threshold": 0.9})
    answers = self_made.own_answers(args, learner, decoder)
    assert 60 < len(answers) <= 70
    assert all(answer.response_ids[-1] == END for answer in answers)
    assert all(len(a.steps) == len(a.response_ids) for a in answers)
    # A run that goes on takes them from the file, the lost part is made again.
    file = tmp_path / "answers-0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 71
    file.write_text("".join(lines[:65]) + lines[65][:9])
    assert self_made.own_answers(args, learner, decoder) == answers
    assert learner.network.training
    with pytest.raises(ValueError, match="they were made with other options"):
        read_answers(file, {"seed": 2})
    args.num_rows = 71
    with pytest.raises(ValueError, match="they were made with other options"):
        self_made.own_answers(args, learner, decoder)


# -- what it does to llada-tiny ---------------------------------------------


def measured(folder, count=96):
    """Mean forwards of `entropy` at 0.5, and the share of right answers."""
    from vllm_dlm.tasks import tokenizer
    from vllm_dlm.tasks.problems import FREE_TASKS, sample_problems
    from vllm_dlm.training.learner import load_learner
    from vllm_dlm.training.reinforcement.rollouts import Decoder, roll_out

    learner = load_learner(folder)
    learner.network.eval()
    problems = sample_problems(count, 5, "heldout", FREE_TASKS)
    rows = roll_out(
        learner.logits_at,
        [
            tokenizer.encode_prompt(problem.question, index % 2 == 0)
            for index, problem in enumerate(problems)
        ],
        canvas=32,
        decoder=Decoder("entropy", {"threshold": 0.5}),
        mask_id=MASK,
        end_id=END,
        seeds=[0] * count,
        stop_at_end=True,
    )
    answers = map(tokenizer.decode, rows.answers(END))
    right = [p.check(text) for p, text in zip(problems, answers, strict=True)]
    return float(rows.steps.amax(1).float().mean()) + 1, sum(right) / count


@pytest.mark.slow
def test_certainty_cuts_forwards(tmp_path):
    command = ["train", "certainty", "llada-tiny", "--output-dir", str(tmp_path)]
    options = "--steps 40 --rounds 2 --num-rows 500 --batch-size 16 --beta 0.5"
    options += " --mask-ratio 0.3 1 --full-mask 0.3 --padding-weight 0.05"
    options += " --learning-rate 3e-4 --threads 1 --num-problems 0 --max-minutes"
    # Stopped in the midst of a round, or not: the same weights and rows follow.
    stopped = [*command, *options.split(), "1e-9"]
    for _ in range(3):
        assert main(stopped) == 0
    assert not (tmp_path / "model.safetensors").exists()
    assert main([*stopped[:-1], "60"]) == 0
    assert (tmp_path / "answers-1.jsonl").is_file()
    before, _ = measured("llada-tiny")
    after, right = measured(tmp_path)
    assert after < 0.9 * before
    assert right >= 0.75


@pytest.mark.slow
def test_the_student_comes_nearer_to_its_teacher(tmp_path):
    options = ["llada-tiny", "--output-dir", str(tmp_path), "--steps", "50"]
    options += ["--num-rows", "500", "--short-caps", "off", "--batch-size", "16"]
    options += ["--learning-rate", "3e-4", "--threads", "1", "--num-problems", "0"]
    assert main(["train", "dscd", *options]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
