# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: masks, loss, and the frame that all recipes share."""

import json

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import Row, lay_out, split_rows, step_generator, task_rows

torch = pytest.importorskip("torch")

END, MASK = 0, 2


def make(folder, **options):
    from training.tiny_learner import tiny_learner

    return tiny_learner(folder, **options)


def some_batch(count=6):
    return lay_out(task_rows(count, 1), end_id=END, canvas_length=24)


def test_masks_lie_on_the_canvas_at_a_rate_per_row():
    from vllm_dlm.training.recipes.sft import corrupt

    batch = lay_out([Row([1, 11], [21, END])] * 400, end_id=END, canvas_length=50)
    masked = corrupt(batch, MASK, step_generator(1, 0))
    is_masked = masked.inputs == MASK
    assert torch.equal(is_masked, masked.weights > 0)
    assert not is_masked[:, :2].any()
    assert torch.equal(masked.inputs[~is_masked], batch.ids[~is_masked])
    shares = is_masked.sum(1) / 50
    assert shares.min() < 0.1 and shares.max() > 0.9
    assert abs(shares.mean() - 0.5) < 0.05
    # The expectation of a row's weights is 1 / R, whatever its rate.
    assert abs(masked.weights.sum() - 1) < 0.1


def test_the_loss_is_the_naive_one(tmp_path):
    from vllm_dlm.training.recipes.sft import corrupt, loss

    learner, batch = make(tmp_path), some_batch()
    learner.network.eval()
    generator = step_generator(1, 0)
    masked = corrupt(batch, MASK, generator)
    with torch.no_grad():
        found = float(loss(learner, masked))
        again = torch.Generator().manual_seed(generator.initial_seed())
        rates = 0.001 + 0.999 * torch.rand((6, 1), generator=again)
        wanted = 0.0
        for row in range(6):
            length = int(batch.valid[row].sum())
            canvas = int(batch.response[row].sum())
            inputs = masked.inputs[row : row + 1, :length]
            logits = learner.network(inputs)[0].log_softmax(-1)
            for place in range(length):
                if inputs[0, place] == MASK:
                    taken = float(logits[place, batch.ids[row, place]])
                    wanted -= taken / (float(rates[row]) * canvas) / 6
    assert abs(found - wanted) < 1e-4 * wanted


def test_a_batch_s_loss_is_that_of_its_rows_alone(tmp_path):
    """No row sees another one's padding; parts of a batch add up to it."""
    from vllm_dlm.training.recipes.sft import corrupt, loss

    learner = make(tmp_path)
    masked = corrupt(some_batch(), MASK, step_generator(1, 0))
    whole = loss(learner, masked)
    for parts in (2, 4, 6):
        alone = sum(loss(learner, part) for part in split_rows(masked, 6, parts))
        torch.testing.assert_close(alone, whole)


def options_of(folder, output, *more):
    return [
        *("train", "sft", str(folder), "--output-dir", str(output)),
        *("--steps", "4", "--batch-size", "6", "--num-rows", "40"),
        *more,
    ]


def weights_of(folder):
    from vllm_dlm.files.model_folders import read_weights

    return read_weights(folder / "model.safetensors")


def largest_difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_accumulation_does_not_change_the_result(tmp_path):
    from training.tiny_learner import tiny_folder

    folder = tiny_folder(tmp_path / "model")
    found = []
    for parts in ("1", "3"):
        output = tmp_path / parts
        assert main(options_of(folder, output, "--accumulate", parts)) == 0
        found.append(weights_of(output))
    assert largest_difference(found[0], weights_of(folder)) > 1e-3
    assert largest_difference(*found) < 1e-5


@pytest.mark.parametrize("adapter", [(), ("--lora-rank", "2", "--lora-dropout", "0.3")])
def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, adapter):
    from training.tiny_learner import tiny_folder

    folder = tiny_folder(tmp_path / "model")
    more = ("--schedule", "cosine", "--warmup", "0.5", *adapter)
    assert main(options_of(folder, tmp_path / "whole", *more)) == 0
    stopped = options_of(folder, tmp_path / "parts", *more)
    # Every run stops after one step.
    for _ in range(4):
        assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert largest_difference(whole, weights_of(folder)) > 0


def test_data_from_a_file_and_what_does_not_fit(tmp_path, capsys):
    from training.tiny_learner import tiny_folder

    folder = tiny_folder(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt_ids": [1, 9], "response_ids": [20] * n + [0]} for n in (2, 9)]
    file.write_text("\n".join(map(json.dumps, rows)))
    more = ("--data", str(file), "--canvas-length", "8")
    assert main(options_of(folder, tmp_path / "out", *more)) == 0
    assert "1 of 2 rows are too long" in capsys.readouterr().out
    more = ("--data", str(file), "--canvas-length", "2")
    assert main(options_of(folder, tmp_path / "out2", *more)) == 2
    assert "the shortest response has 3 tokens" in capsys.readouterr().err
