# SPDX-License-Identifier: Apache-2.0
"""Training on wrong tokens: what is replaced, the model's own tokens, and the loss."""

from functools import partial

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import Row, lay_out, split_rows, step_generator, task_rows

torch = pytest.importorskip("torch")

from training.tiny_learner import (  # noqa: E402
    tiny_folder,
    tiny_learner,
    train_command,
    weights_of,
)

END, MASK, VOCABULARY = 0, 2, 100


def make(folder, layout="llada", **options):
    return tiny_learner(folder, layout, **options)


def some_batch(count=6):
    return lay_out(task_rows(count, 1), end_id=END, canvas_length=24)


def long_batch(count=400):
    row = Row([1, 11], [21, 22, END])
    return lay_out([row] * count, end_id=END, canvas_length=120)


def test_another_token_is_any_but_itself_and_the_mask():
    from vllm_dlm.training.recipes.t2t import other_tokens

    # All 5 of a vocabulary of 5 with mask 2, often enough to see every other token.
    ids = torch.tensor([0, 1, 3, 4]).repeat(2000, 1)
    others = other_tokens(ids, 5, 2, step_generator(1, 0))
    for column, token in enumerate((0, 1, 3, 4)):
        counts = torch.bincount(others[:, column], minlength=5)
        assert counts[token] == counts[2] == 0
        drawn = counts[counts > 0]
        assert len(drawn) == 3 and (drawn - 2000 / 3).abs().max() < 100


def test_masks_and_wrong_tokens_lie_on_the_canvas_at_their_rates():
    from vllm_dlm.training.recipes.t2t import corrupt

    batch = long_batch()
    edits = corrupt(
        batch, MASK, VOCABULARY, step_generator(1, 0), mask_rate=0.4, kept_weight=0.25
    )
    assert edits.inputs.shape == (400, 1, 122)
    inputs, weights = edits.inputs[:, 0], edits.weights[:, 0]
    masked = inputs == MASK
    replaced = ~masked & (inputs != batch.ids)
    assert not (masked | replaced)[:, :2].any()
    assert abs(masked[:, 2:].float().mean() - 0.4) < 0.02
    # Of 72 tokens without masks one is wrong, but in 1 row of 100,000.
    edited = replaced.any(1)
    assert abs(edited.float().mean() - 0.5) < 0.08
    share = replaced[edited].sum() / (~masked[edited][:, 2:]).sum()
    assert abs(share - 0.15) < 0.01
    # Weights: 1 for what is masked or wrong, a quarter for the rest of such a canvas.
    kept = batch.response & ~masked & ~replaced & edited[:, None]
    unit = 1 / ((masked | replaced).sum() + 0.25 * kept.sum())
    expected = unit * ((masked | replaced) + 0.25 * kept)
    torch.testing.assert_close(weights, expected)
    assert not edits.written.any()


def test_weights_of_one_row_by_hand():
    """Canvas of 4, 1 mask, 1 wrong token: 1 / (2 + 2 x 0.2) = 5 / 12 each."""
    from vllm_dlm.training.recipes.t2t import corrupt

    batch = lay_out([Row([1, 11], [21, 22, 23, END])], end_id=END)
    for seed in range(200):
        edits = corrupt(
            batch,
            MASK,
            VOCABULARY,
            step_generator(seed, 0),
            edit_share=1.0,
            replace_rate=0.4,
            mask_rate=0.25,
        )
        inputs = edits.inputs[0, 0]
        wrong = (inputs != batch.ids[0]) & (inputs != MASK)
        if (inputs == MASK).sum() == wrong.sum() == 1:
            break
    weights = edits.weights[0, 0]
    assert weights[:2].tolist() == [0, 0]
    assert sorted(weights[2:].tolist()) == pytest.approx([1 / 12] * 2 + [5 / 12] * 2)
    assert weights[wrong].item() == pytest.approx(5 / 12)


def test_on_policy_has_each_row_twice_and_writes_one_of_them(tmp_path):
    from vllm_dlm.training.recipes.t2t import corrupt_on_policy, fill

    learner, batch = make(tmp_path), some_batch()
    edits = corrupt_on_policy(batch, MASK, step_generator(1, 0))
    masked = edits.inputs == MASK
    assert torch.equal(masked[:, 0], masked[:, 1])
    assert not edits.written[:, 0].any()
    assert torch.equal(edits.written[:, 1], masked[:, 1])
    torch.testing.assert_close(edits.weights, masked / masked.sum())
    assert abs(masked[:, 0][batch.response].float().mean() - 0.75) < 0.1
    found = fill(learner, edits)
    assert learner.network.training
    assert torch.equal(found[:, 0], edits.inputs[:, 0])
    learner.network.eval()
    for row in range(len(batch.ids)):
        length = int(batch.valid[row].sum())
        inputs = edits.inputs[row, 0, :length]
        with torch.no_grad():
            logits = learner.network(inputs[None])[0]
        logits[:, MASK] = -torch.inf
        best = torch.where(inputs == MASK, logits.argmax(-1), inputs)
        assert torch.equal(found[row, 1, :length], best)
        assert not (found[row, 1] == MASK).any()


def naive_logits(learner, inputs, clean):
    """Logits [L, V] of a row: each block behind the clean text to its left."""
    block = learner.attention_block
    if block is None:
        return learner.network(inputs[None])[0]
    found = []
    for start in range(0, len(inputs), block):
        row = torch.cat((clean[:start], inputs[start : start + block]))
        found.append(learner.network(row[None])[0, start:])
    return torch.cat(found)


@pytest.mark.parametrize("layout", ["llada", "sdar"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_loss_is_the_naive_one(tmp_path, layout, on_policy):
    from vllm_dlm.training.recipes.t2t import corrupt, corrupt_on_policy, loss

    learner, batch = make(tmp_path, layout), some_batch()
    learner.network.eval()
    generator = step_generator(1, 0)
    if on_policy:
        edits = corrupt_on_policy(batch, MASK, generator)
    else:
        edits = corrupt(batch, MASK, VOCABULARY, generator, edit_share=1.0)
    with torch.no_grad():
        found = float(loss(learner, edits))
        total, count = 0.0, 0.0
        for row in range(len(batch.ids)):
            length = int(batch.valid[row].sum())
            ids = batch.ids[row, :length]
            for copy in range(edits.inputs.shape[1]):
                inputs = edits.inputs[row, copy, :length]
                masked = inputs == MASK
                counts = (masked | (inputs != ids)).float()
                if not on_policy:
                    canvas = batch.response[row, :length]
                    counts = torch.where(counts > 0, 1.0, 0.2) * canvas
                if copy == 1:
                    logits = naive_logits(learner, inputs, ids)
                    logits[:, MASK] = -torch.inf
                    inputs = torch.where(masked, logits.argmax(-1), inputs)
                taken = naive_logits(learner, inputs, ids).log_softmax(-1)
                total -= float((taken[range(length), ids] * counts).sum())
                count += float(counts.sum())
    assert found == pytest.approx(total / count, rel=1e-4)


def test_a_batch_s_loss_is_that_of_its_rows_alone(tmp_path):
    from vllm_dlm.training.recipes.t2t import corrupt_on_policy, loss

    learner = make(tmp_path)
    edits = corrupt_on_policy(some_batch(), MASK, step_generator(1, 0))
    whole = loss(learner, edits)
    for parts in (2, 6):
        alone = sum(loss(learner, part) for part in split_rows(edits, 6, parts))
        torch.testing.assert_close(alone, whole)


def test_learning_from_wrong_tokens_alone_forgets_the_right_ones(tmp_path):
    """Why right tokens count too: else nothing says that a token may stay."""
    from vllm_dlm.training.recipes.t2t import corrupt

    edits = corrupt(
        long_batch(), MASK, VOCABULARY, step_generator(1, 0), kept_weight=0.0
    )
    taught = edits.weights > 0
    assert (edits.inputs[taught] != edits.ids[:, None][taught]).all()


options_of = partial(train_command, "t2t")


@pytest.mark.parametrize(
    "more", [pytest.param((), marks=pytest.mark.slow), ("--on-policy",)]
)
def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, more):
    folder = tiny_folder(tmp_path / "model")
    assert main(options_of(folder, tmp_path / "whole", *more)) == 0
    stopped = options_of(folder, tmp_path / "parts", *more)
    # Every run stops after one step.
    for _ in range(4):
        assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    before = weights_of(folder)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], before[name]) for name in whole)


def test_the_folder_s_defaults_are_joint_s(tmp_path):
    from vllm_dlm.files.model_folders import Config

    folder = tiny_folder(tmp_path / "model")
    more = ("--steps", "1", "--mask-threshold", "0.4", "--edit-threshold", "0.1")
    assert main(options_of(folder, tmp_path / "out", *more)) == 0
    assert Config(tmp_path / "out").values["dlm_options"] == {
        "strategy": "joint",
        "strategy_config": {"mask_threshold": 0.4, "edit_threshold": 0.1},
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--on-policy", "--edit-share", "0.3"), "leave out --edit-share"),
        (
            ("--on-policy", "--replace-rate", "0.3", "--kept-weight", "0"),
            "leave out --replace-rate, --kept-weight",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, more, words):
    assert main(options_of("llada-tiny", tmp_path, *more)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ("--edit-share", "1.5"),
        ("--replace-rate", "0"),
        ("--mask-rate", "-1"),
        ("--kept-weight", "x"),
        ("--edit-threshold", "2"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, capsys, more):
    with pytest.raises(SystemExit):
        main(options_of("llada-tiny", tmp_path, *more))
    assert more[0] in capsys.readouterr().err
