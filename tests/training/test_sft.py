# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning: masks, loss, and the frame that all recipes share."""

import json
from functools import partial

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.training.rows import Row, lay_out, split_rows, step_generator, task_rows

torch = pytest.importorskip("torch")

from training.tiny_learner import (  # noqa: E402
    largest_difference,
    tiny_folder,
    tiny_learner,
    train_command,
    weights_of,
)

END, MASK = 0, 2


def make(folder, **options):
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


@pytest.mark.parametrize("layout", ["llada", "sdar"])
def test_a_batch_s_loss_is_that_of_its_rows_alone(tmp_path, layout):
    """No row sees another one's padding; parts of a batch add up to it."""
    from vllm_dlm.training.recipes.sft import corrupt, loss

    learner = make(tmp_path, layout=layout)
    masked = corrupt(some_batch(), MASK, step_generator(1, 0))
    whole = loss(learner, masked)
    for parts in (2, 4, 6):
        alone = sum(loss(learner, part) for part in split_rows(masked, 6, parts))
        torch.testing.assert_close(alone, whole)


options_of = partial(train_command, "sft")


def test_accumulation_does_not_change_the_result(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    found = []
    for parts in ("1", "3"):
        output = tmp_path / parts
        assert main(options_of(folder, output, "--accumulate", parts)) == 0
        found.append(weights_of(output))
    assert largest_difference(found[0], weights_of(folder)) > 1e-3
    assert largest_difference(*found) < 1e-5


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--lora-rank", "2", "--lora-dropout", "0.3"),
    ],
)
def test_an_interrupted_run_ends_at_the_same_bits(tmp_path, adapter):
    from vllm_dlm.training.progress import read_progress

    folder = tiny_folder(tmp_path / "model")
    more = ("--schedule", "cosine", "--warmup", "0.5", *adapter)
    assert main(options_of(folder, tmp_path / "whole", *more)) == 0
    kept = read_progress(tmp_path / "whole/training.pt").model
    assert all("lora_" in name for name in kept) == bool(adapter)
    stopped = options_of(folder, tmp_path / "parts", *more)
    # Every run stops after one step.
    for _ in range(4):
        assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert largest_difference(whole, weights_of(folder)) > 0


def test_data_from_a_file_and_what_does_not_fit(tmp_path, capsys):
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


def test_a_run_measures_before_and_after_and_writes_a_card(tmp_path, capsys):
    from vllm_dlm.training.metrics import read_metrics
    from vllm_dlm.training.recipes.report import Measures

    folder, output = tiny_folder(tmp_path / "model"), tmp_path / "out"
    stopped = options_of(folder, output, "--num-problems", "4")
    assert main([*stopped, "--max-minutes", "1e-9"]) == 0
    first = Measures.read(output / "measures.json")
    assert [each.problems for each in first.before] == [4, 4] and not first.after
    # A line behind the checkpoint, as of a run that was killed.
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.0}\n{"step": 3')
    assert main(stopped) == 0
    measures = Measures.read(output / "measures.json")
    assert measures.before == first.before
    assert [each.name for each in measures.after] == [
        each.name for each in measures.before
    ]
    assert all(each.forwards > 0 for each in measures.after)
    lines = read_metrics(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["learning_rate"] == 5e-4 for line in lines)
    assert lines[-1]["seconds"] >= lines[0]["seconds"] > 0
    card = (output / "README.md").read_text()
    assert "static, 1 token per step" in card and "0.03 million weights" in card
    assert "| decoding | forwards before |" in capsys.readouterr().out


def test_rows_to_measure_with_are_not_trained_on(tmp_path):
    from vllm_dlm.cli.command import make_parser
    from vllm_dlm.training.recipes.command import start
    from vllm_dlm.training.recipes.sft import RECIPE

    folder = tiny_folder(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt_ids": [1, 9], "response_ids": [n, 0]} for n in range(20, 60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    more = ("--data", str(file), "--num-problems", "50")
    argv = options_of(folder, tmp_path / "out", *more)
    found = [start(RECIPE, make_parser(argv).parse_args(argv)) for _ in range(2)]
    training = found[0]
    assert len(training.held_out) == 4 and len(training.rows) == 36
    assert not {str(row) for row in training.held_out} & {
        str(row) for row in training.rows
    }
    assert found[1].held_out == training.held_out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--learning-rate", "-1"), "--learning-rate -1: from 0"),
        (("--warmup", "2"), "--warmup 2: from 0 to 1"),
        (("--max-norm", "0"), "--max-norm 0: above 0"),
        (("--betas", "0.9", "1"), "each below 1"),
        (("--canvas-length", "8", "--row-length", "9"), "either"),
        (("--lora-alpha", "8"), "set --lora-rank too"),
        (("--compile",), "--compile"),
        (("--report-to", "wandb"), "pip install wandb"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, capsys, options, reason):
    if "wandb" in options:
        from importlib.util import find_spec

        if find_spec("wandb") is not None:
            pytest.skip("wandb is installed")
    argv = options_of(tmp_path / "missing", tmp_path / "out", *options)
    assert main(argv) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1, 1, 0.8828, 0.6, 0.3172]),
    ],
)
def test_schedules(schedule, wanted):
    from types import SimpleNamespace

    from vllm_dlm.training.recipes.options import rate_of

    args = SimpleNamespace(schedule=schedule, warmup=1 / 3, lowest_rate=0.2)
    rate = rate_of(args)
    assert [round(rate(step, 6), 4) for step in range(6)] == wanted


def test_a_dashboard_gets_each_step(tmp_path):
    pytest.importorskip("tensorboard")
    from vllm_dlm.training.metrics import Metrics

    metrics = Metrics(tmp_path, ["tensorboard"])
    metrics.write(1, {"loss": 0.5})
    metrics.close()
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_damaged_file_of_metrics_is_named(tmp_path):
    from vllm_dlm.training.metrics import Metrics

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"stop": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        Metrics(tmp_path)


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from vllm_dlm.training.recipes.report import Measure, Measures, draw_curve

    one = Measure(name="static", options={}, problems=4, right=0.5, forwards=8.0)
    measures = Measures(canvas=32, before=[one], after=[one])
    assert draw_curve(measures, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
