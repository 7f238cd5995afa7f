# SPDX-License-Identifier: Apache-2.0
"""The command: its arguments, its file, resuming; with the plain loop, no engine."""

import argparse
import json
from pathlib import Path

import pytest
from bench.conftest import TINY
from reference.llada import write_random_checkpoint

from vllm_dlm.bench import command, report
from vllm_dlm.bench.engine import load_adapter

PLAIN = (
    *("--model", TINY, "--skip-ours", "--against", "plain"),
    *("--requests", "2", "--concurrency", "1"),
)
SHORT = ("--prompt-len", "8", "--max-tokens", "16", "--block-length", "8")

ADAPTER = '''
from vllm_dlm.bench.engine import Answer, Costs, Unsupported


class Echo:
    """Says the prompt again, a token at a time."""

    def start(self, model, options):
        self.delay = float(options["delay"])

    def generate(self, prompts, work, on_answer):
        if work.strategy == "threshold":
            raise Unsupported("no thresholds here")
        for _ in prompts:
            on_answer()
        return [
            Answer(list(prompt), self.delay, 1, self.delay * len(prompt), 4)
            for prompt in prompts
        ]

    def stop(self):
        pass


class Weighed(Echo):
    """Says what its steps cost, too: as many launches as prompts were answered."""

    def generate(self, prompts, work, on_answer):
        self.answered = len(prompts)
        return super().generate(prompts, work, on_answer)

    def start_costing(self):
        self.answered = 0

    def costs(self):
        return Costs(4, 10 * self.answered, 3 << 19, 5 << 20)


class Half:
    def start(self, model, options):
        pass
'''


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    path = tmp_path / "echo.py"
    path.write_text(ADAPTER)
    return f"{path}:Echo"


def test_the_file_has_every_cell_and_what_it_depends_on(bench):
    data = bench(
        *PLAIN,
        *SHORT,
        "--strategies",
        "static",
        "--steps",
        "8",
        "--caches",
        "none,dual",
    )
    (environment,) = data["environments"]
    assert environment["threads"] == 1
    assert environment["arguments"]["model"] == TINY
    assert environment["vllm"] and environment["torch"] and environment["cpu"]
    assert [cell["setting"] for cell in data["cells"]] == [
        "static, none",
        "static, dual",
    ]
    for cell in data["cells"]:
        assert (cell["engine"], cell["dtype"], cell["requests"]) == (
            "plain",
            "float32",
            2,
        )
        assert cell["forwards_per_request"] == 8
        assert cell["tokens"] == 32
        assert cell["tokens_per_forward"] == 2
        assert cell["tokens_per_second"] == pytest.approx(32 / cell["seconds"])
        assert 0 < cell["first_token_p50"] <= cell["first_token_p99"]
        assert cell["gflops"] > 0 and cell["peak_gflops"] > 0
    none, dual = data["cells"]
    # 2 requests, 2 blocks, 4 steps: all 24 positions, or a block's 8 but for the first.
    assert none["counts"]["rows"] == 2 * 2 * 4 * 24
    assert dual["counts"]["rows"] == 2 * 2 * (24 + 3 * 8)


def test_resuming_measures_what_is_missing(bench):
    first = bench(*PLAIN, *SHORT, "--strategies", "static")
    again = bench(*PLAIN, *SHORT, "--strategies", "static,threshold", "--resume")
    assert again["cells"][0] == first["cells"][0]
    assert [cell["environment"] for cell in again["cells"]] == [0, 1]
    longer = ("--prompt-len", "9")
    more = bench(*PLAIN, *SHORT, *longer, "--strategies", "static", "--resume")
    assert more["cells"][:2] == again["cells"]
    assert len(more["cells"]) == 3


def test_resuming_tells_checkpoints_of_one_name_apart(bench, tmp_path):
    for seed, run in enumerate("ab"):
        write_random_checkpoint(tmp_path / run / "checkpoint", seed=seed)
    options = (*SHORT, "--strategies", "static", "--requests", "2", "--skip-ours")
    options = (*options, "--against", "plain", "--concurrency", "1")
    bench("--model", str(tmp_path / "a" / "checkpoint"), *options)
    for run, cells in (("a", 1), ("b", 2), ("a", 2)):
        model = str(tmp_path / run / "checkpoint")
        data = bench("--model", model, *options, "--resume")
        assert len(data["cells"]) == cells
    assert str(tmp_path) not in json.dumps(data)


def test_a_file_is_not_overwritten(bench, tmp_path):
    bench(*PLAIN, *SHORT, "--strategies", "static")
    with pytest.raises(ValueError, match="--resume"):
        bench(*PLAIN, *SHORT, "--strategies", "static")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="not a file of results"):
        bench(*PLAIN, *SHORT, "--resume")


def test_an_adapter_is_measured_and_may_refuse(bench, adapter, capsys):
    data = bench(
        *("--model", TINY, "--skip-ours", *SHORT, "--against", f"adapter:{adapter}"),
        *("--adapter-option", "delay=0.25", "--strategies", "static,threshold"),
        *("--concurrency", "1,2"),
    )
    static = [cell for cell in data["cells"] if cell["strategy"] == "static"]
    assert [cell["concurrency"] for cell in static] == [1, 2]
    assert static[0]["first_token_p50"] == 0.25
    assert static[0]["per_token_p99"] == pytest.approx(0.25)
    refused = [cell for cell in data["cells"] if cell["strategy"] == "threshold"]
    assert {cell["error"] for cell in refused} == {"no thresholds here"}
    assert "no thresholds here" in capsys.readouterr().out
    assert {cell["engine"] for cell in data["cells"]} == {"adapter:echo.py:Echo"}
    # Neither folders nor what an adapter is told, which may be a key.
    assert data["environments"][0]["arguments"]["adapter_option"] == ["delay"]
    assert "0.25" not in data["cells"][0]["key"]
    assert str(Path(adapter).parent) not in json.dumps(data)


def test_what_steps_cost_is_measured_where_it_is_asked_for(bench, adapter, capsys):
    arguments = (
        *("--model", TINY, "--skip-ours", *SHORT, "--strategies", "static"),
        *("--against", f"adapter:{adapter.replace('Echo', 'Weighed')}"),
        *("--adapter-option", "delay=0.25", "--requests", "8", "--concurrency", "2"),
    )
    (cell,) = bench(*arguments)["cells"]
    assert "launches_per_step" not in cell
    assert "launches/step" not in capsys.readouterr().out
    (_, cell) = bench(*arguments, "--step-costs", "--resume")["cells"]
    # Of one round of requests, by themselves.
    assert cell["launches_per_step"] == 10 * 2 / 4
    assert (cell["sampling_mib"], cell["state_mib"]) == (1.5, 5.0)
    shown = capsys.readouterr().out
    assert "launches/step" in shown and "5.000" in shown


def test_native_is_of_one_model(bench):
    with pytest.raises(ValueError, match="another model: leave native out"):
        bench("--model", TINY, "--skip-ours", "--against", "native")


def test_broken_adapters_say_what_is_wrong(adapter):
    path = adapter.rpartition(":")[0]
    with pytest.raises(ValueError, match="lacks generate, stop"):
        load_adapter(f"{path}:Half")
    with pytest.raises(ValueError, match=r"no class Other; it has Echo, Half"):
        load_adapter(f"{path}:Other")
    with pytest.raises(ValueError, match="there is no file"):
        load_adapter("elsewhere.py:Echo")
    with pytest.raises(ValueError, match="expected FILE.py:Class"):
        load_adapter("Echo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--caches", "none,triple"), "'triple' is not one of none, prefix, dual"),
        (("--dtype", "float8"), "'float8' is not one of float32, bfloat16"),
        (("--strategies", "thresold"), "threshold"),
        (("--strategies", "threshold:limit=1"), "Valid: threshold"),
        (("--against", "sglang"), "plain, ar, native, adapter:FILE.py:Class"),
        (("--concurrency", "1,0"), "'0' is not a whole number >= 1"),
        (("--mode", "both"), "serve"),
        (("--engine-option", "enforce_eager"), "expected NAME=VALUE"),
        (("--server-option", "comit=1"), "commit"),
    ],
)
def test_wrong_arguments_name_the_right_ones(arguments, message, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("random:depth=3", "Valid: d, layers, heads, mlp, vocab, family"),
        ("random:family=gpt", "llada, sdar, diffusion_gemma"),
        ("random:d=0", "d must be a whole number >= 1"),
        ("random:d=65", "multiple of twice"),
        ("random:vocab=2", "at least 8"),
    ],
)
def test_wrong_models_name_the_right_ones(bench, model, message):
    with pytest.raises(ValueError, match=message):
        bench("--model", model, "--skip-ours", "--against", "plain")


def test_nothing_to_measure(bench):
    with pytest.raises(ValueError, match="--against"):
        bench("--skip-ours")
    with pytest.raises(ValueError, match="--concurrency 16 requests in flight"):
        bench("--requests", "4")


def cell(engine: str, concurrency: int, speed: float, accuracy: float | None) -> dict:
    return {
        "engine": engine,
        "setting": "static, none",
        "dtype": "float32",
        "concurrency": concurrency,
        "tokens_per_second": speed,
        "tokens_per_forward": 2.0,
        "accuracy": accuracy,
    }


def test_the_table_leaves_out_what_nobody_measured(capsys):
    report.print_table([cell("vllm-dlm", 4, 12.34, None)])
    heading, row = capsys.readouterr().out.splitlines()
    assert "tokens/s" in heading and "accuracy" not in heading
    assert row.split() == [
        "vllm-dlm",
        "static,",
        "none",
        "float32",
        "4",
        "2.00",
        "12.3",
    ]


def test_the_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    path = tmp_path / "plot.png"
    report.plot([cell("vllm-dlm", n, 10.0 * n, 0.5) for n in (1, 4)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_answers_from_a_file_are_judged(bench, tmp_path):
    from vllm_dlm.tasks.problems import sample_problems

    path = tmp_path / "questions.jsonl"
    problems = sample_problems(2, 0, "heldout", ["copy"])
    lines = [{"prompt": p.question, "answer": p.answer} for p in problems]
    lines.append({"prompt": problems[0].question, "answer": "something else"})
    path.write_text("\n".join(map(json.dumps, lines)))
    from vllm_dlm.config.aliases import resolve

    data = bench(
        *("--model", resolve("llada-tiny"), "--prompts", str(path), "--requests", "3"),
        *(
            "--concurrency",
            "1",
            "--skip-ours",
            "--against",
            "plain",
            "--max-tokens",
            "32",
        ),
    )
    assert data["cells"][0]["accuracy"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="has 3 prompts"):
        bench(
            *("--model", resolve("llada-tiny"), "--prompts", str(path)),
            *(
                "--requests",
                "4",
                "--concurrency",
                "1",
                "--skip-ours",
                "--against",
                "plain",
                "--resume",
            ),
        )
