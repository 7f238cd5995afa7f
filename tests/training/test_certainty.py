# SPDX-License-Identifier: Apache-2.0
"""Certainty forcing: masks, a loss computed again position by position, its effect."""

import math

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import lay_out, step_generator, task_rows

torch = pytest.importorskip("torch")

from training.distillation_cases import (  # noqa: E402
    END,
    MASK,
    batch_of,
    learner_of,
)

from vllm_dlm.training.recipes import (  # noqa: E402
    certainty,
    d3llm,
    two_ways,
)


def entropy_of(logits, temperature):
    scaled = [value / temperature for value in logits]
    total = sum(math.exp(value) for value in scaled)
    shares = [math.exp(value) / total for value in scaled]
    return -sum(share * math.log(share) for share in shares if share > 0)


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
