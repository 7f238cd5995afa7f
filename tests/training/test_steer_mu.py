# SPDX-License-Identifier: Apache-2.0
"""The constant of steering: the paper's mean, the likeliest mu, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from steering.reference import steered_logits

from vllm_dlm.cli.command import main
from vllm_dlm.steering.options import read_constant
from vllm_dlm.training.drafters.teacher import load_causal_lm
from vllm_dlm.training.rows import Row, task_rows
from vllm_dlm.training.steer_mu import GRID, Calibration, calibrate, report

KEEP = 0.1


@pytest.fixture(scope="module")
def models():
    return load_causal_lm("llama-tiny"), load_causal_lm("llama-tiny-draft")


def naive(models, rows: list[Row]) -> tuple[list[float], dict[float, float]]:
    """Token after token: the paper's mu, and losses at some values of the grid."""
    mus, losses = [], {mu: [] for mu in (-8.0, -0.5, 0.0, 3.0)}
    for row in rows:
        for place, token in enumerate(row.response_ids):
            text = torch.tensor([row.prompt_ids + row.response_ids[:place]])
            with torch.no_grad():
                z, base = (model(text).logits[0, -1] for model in models)
            p = z.double().softmax(-1)
            if p[token] < KEEP * p.max():
                continue
            delta = steered_logits(z, base, 1.0, 0.0) - z.double()
            wanted = -p
            wanted[token] += 1
            mus.append(float(wanted @ delta / (delta @ delta + 1e-12)))
            for mu, values in losses.items():
                log_p = steered_logits(z, base, mu, KEEP).log_softmax(-1)
                values.append(-float(log_p[token]))
    return mus, {mu: sum(values) / len(values) for mu, values in losses.items()}


def test_it_is_the_naive_loops(models):
    rows = task_rows(6, 4)
    found = calibrate(*models, rows, keep=KEEP, batch_rows=5)
    mus, losses = naive(models, rows)
    assert found.kept == len(mus)
    assert found.tokens == sum(len(row.response_ids) for row in rows)
    # Where the models agree, rounding decides a token's mu, and so the order of some.
    middle = (len(mus) - 1) // 2
    around = sorted(mus)[middle - 2 : middle + 3]
    assert around[0] - 1e-3 <= found.median <= around[-1] + 1e-3
    sure = [mu for mu in mus if abs(mu) < 5]
    assert len(sure) > 0.9 * len(mus)
    for mu, loss in losses.items():
        assert found.losses[GRID.index(mu)] == pytest.approx(loss, abs=1e-3)


def test_the_likeliest_and_what_is_said_of_it():
    losses = [(mu - 1.5) ** 2 for mu in GRID]
    found = Calibration(2, 9, 8, -0.5, 0.1, -0.4, losses)
    assert found.likelihood == 1.5
    assert found.loss(-0.5) == pytest.approx(4.0)
    assert "less probable than no steering" in report(found, KEEP)
    better = Calibration(2, 9, 8, 1.0, 0.1, 0.9, losses)
    assert "less probable" not in report(better, KEEP)


def test_a_base_that_is_right_has_a_positive_constant(models):
    """The better model in the place of the base: the way leads there."""
    tuned, base = models
    rows = task_rows(16, 5)
    found = calibrate(base, tuned, rows)
    assert found.mean > 0 and found.likelihood > 0
    assert found.loss(found.likelihood) < found.loss(0)


def test_what_cannot_be_measured(models):
    row = task_rows(1, 6)[0]
    with pytest.raises(ValueError, match="1100 tokens, and .* reads 1024"):
        calibrate(*models, [Row(row.prompt_ids, [5] * (1100 - len(row.prompt_ids)))])
    wrong = Row(row.prompt_ids, [127])
    with pytest.raises(ValueError, match="no token of the answers could be written"):
        calibrate(*models, [wrong], keep=1.0)


def test_the_command(tmp_path, capsys):
    data, output = tmp_path / "data.jsonl", tmp_path / "mu.json"
    lines = [
        {"prompt_ids": row.prompt_ids, "response_ids": row.response_ids}
        for row in task_rows(20, 7)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["train", "steer-mu", "--data", str(data), "--output", str(output)]
    assert main([*argv, "--fit", "likelihood", "--keep", "0.2"]) == 0
    constant = read_constant(output)
    assert (constant.keep, constant.fit) == (0.2, "likelihood")
    assert constant.mu in GRID and math.isfinite(constant.mu)
    assert (constant.tuned, constant.base) == ("llama-tiny", "llama-tiny-draft")
    said = capsys.readouterr().out
    assert "answer tokens of 20 rows" in said
    assert f"mu {constant.mu:.4g} (--fit likelihood) -> {output}" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--keep", "1.5"], "--keep must be from 0 to 1"),
        (["--data", "no-such.jsonl"], "No such file"),
        (["--base", "llada-tiny"], "not an autoregressive model"),
    ],
)
def test_the_command_refuses(argv, message, tmp_path, capsys):
    output = str(tmp_path / "mu.json")
    assert main(["train", "steer-mu", "--output", output, *argv]) != 0
    assert message in capsys.readouterr().err
