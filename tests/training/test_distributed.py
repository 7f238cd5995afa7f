# SPDX-License-Identifier: Apache-2.0
"""Several processes train what one trains: adapters (DDP) and all weights (FSDP2)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from vllm_dlm.cli.command import main  # noqa: E402
from vllm_dlm.training.distributed import (  # noqa: E402
    Processes,
    alone,
    gather,
    join,
    layers_of,
)

ADAPTER = ("--lora-rank", "3")


def command(folder, output, steps, *more):
    return [
        *("train", "sft", str(folder), "--output-dir", str(output)),
        *("--steps", str(steps), "--batch-size", "8", "--num-rows", "64"),
        *("--canvas-length", "24", "--learning-rate", "0.01", "--threads", "1"),
        *("--num-problems", "4"),
        *more,
    ]


def together(tmp_path, commands, measured, processes=2):
    """Let several processes do what `two_processes` says; what they printed."""
    file = tmp_path / "todo.json"
    todo = {"commands": commands, "measured": measured}
    file.write_text(json.dumps(todo), encoding="utf-8")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes)),
            *(str(Path(__file__).with_name("two_processes.py")), str(file)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return printed


def weights(folder):
    from vllm_dlm.files.model_folders import read_all_weights

    return read_all_weights(folder)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    """Of a 2-layer network, some steps, stopped and resumed in between."""
    from training.tiny_learner import tiny_folder
    from training.two_processes import measure

    from vllm_dlm.training.metrics import METRICS, read_metrics
    from vllm_dlm.training.recipes.report import MEASURES, Measures

    llada = tiny_folder(tmp_path / "llada")
    sdar = tiny_folder(tmp_path / "sdar", "sdar")
    # Also with a step in parts, with every layer computed twice, and packed.
    runs = {
        "all": (llada, ("--accumulate", "2")),
        "sdar-all": (sdar, ("--checkpointing", "--packed")),
        "adapter": (llada, (*ADAPTER, "--packed")),
    }
    commands, measured = [], {}
    for name, (folder, more) in runs.items():
        assert main(command(folder, tmp_path / name / "one", 4, *more)) == 0
        for output in ("two", "resumed"):
            both = command(folder, tmp_path / name / output, 4, *more)
            commands.append([both, 0])
        # Two steps in one process, and the others in two.
        half = command(folder, tmp_path / name / "resumed", 2, *more)
        assert main(half) == 0
        measured[str(tmp_path / f"{name}.pt")] = half
    odd = command(llada, tmp_path / "odd", 2, "--batch-size", "7")
    commands.append([odd, 2])
    printed = together(tmp_path, commands, measured)
    assert "--batch-size is a multiple of 2, not 7" in printed
    # In AdamW's steps the scale of gradients cancels: here are the gradients.
    for file, half in measured.items():
        alike, found = measure(half), torch.load(file)
        assert found.pop("sharded") == (Path(file).stem != "adapter")
        assert not alike.pop("sharded")
        torch.testing.assert_close(found, alike, atol=1e-6, rtol=1e-4)
    for name, (folder, more) in runs.items():
        # What was measured and decoded on the way is the same too.
        first, second = (
            [
                {**line, "seconds": 0}
                for line in read_metrics(tmp_path / name / each / METRICS)
            ]
            for each in ("one", "two")
        )
        assert [line["step"] for line in first] == [1, 2, 3, 4]
        assert second == [pytest.approx(line, rel=1e-4) for line in first]
        measures = [
            Measures.read(tmp_path / name / each / MEASURES) for each in ("one", "two")
        ]
        assert measures[0] == measures[1] and measures[0].after
        one, before = weights(tmp_path / name / "one"), weights(folder)
        assert any(not torch.equal(one[each], before[each]) for each in one)
        for output in ("two", "resumed"):
            found = weights(tmp_path / name / output)
            torch.testing.assert_close(found, one, atol=2e-5, rtol=2e-4)
        # And on in one process, from what two have written.
        for output in ("one", "two"):
            again = command(folder, tmp_path / name / output, 5, *more)
            assert main(again) == 0
        one, found = (weights(tmp_path / name / each) for each in ("one", "two"))
        torch.testing.assert_close(found, one, atol=2e-5, rtol=2e-4)


def test_rows_are_shared_in_turn():
    from vllm_dlm.training.rows import Row, lay_out

    batch = lay_out([Row([1], [place, 0]) for place in range(6)], end_id=0)
    shares = [Processes(rank, 2, torch.device("cpu")).share(batch) for rank in (0, 1)]
    assert [share.ids[:, 1].tolist() for share in shares] == [[0, 2, 4], [1, 3, 5]]
    assert alone("cpu").share(batch) is batch


def test_one_process_is_left_as_it_is():
    one = alone("cpu")
    assert one.total(2.5) == 2.5 and one.of_first(3.0) == 3.0
    weight = torch.nn.Parameter(torch.ones(2))
    one.sum_gradients([weight])
    assert weight.grad is None
    state = {"a": [torch.ones(2), 3], "b": ("c",)}
    assert gather(state) == state | {"a": [state["a"][0], 3]}


def test_a_device_by_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cpu or cuda, not 'cuda:1'"):
        join("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="this machine has 0 GPUs"):
        join("cuda")


def test_layers_are_found_by_their_name():
    from training.tiny_learner import SHAPE

    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel

    assert len(layers_of(LLaDAModel(SHAPE))) == 2
    with pytest.raises(ValueError, match="blocks or layers"):
        layers_of(torch.nn.Linear(1, 1))
