# SPDX-License-Identifier: Apache-2.0
"""benchmarks/kernels.py: it times what it says, and writes it down."""

import json
import sys
from pathlib import Path

import pytest
import torch

# Benchmarks are no part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import kernels  # noqa: E402

sys.path.pop()


def test_a_run(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    threads = torch.get_num_threads()
    try:
        arguments = ["--shapes", "2x50", "3x7", "--repeats", "2", "--device", "cpu"]
        assert kernels.main([*arguments, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads(path.read_text())
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["threads"] == 1
    cases = [(row["kernel"], row["rows"], row["dtype"]) for row in record["results"]]
    assert len(set(cases)) == 2 * 2 * len(kernels.KERNELS)
    for row in record["results"]:
        assert 0 < row["least_ms"] <= row["ms"]
        assert 0 < row["counterpart_least_ms"] <= row["counterpart_ms"]
    assert "2 x 50" in capsys.readouterr().out


def test_counterparts_compute_the_same():
    logits = torch.randn(4, 300)
    ours, plain = (function() for function in kernels.KERNELS["token_stats"](logits))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    ours, plain = (function() for function in kernels.KERNELS["top_logprobs"](logits))
    torch.testing.assert_close(ours[1][:, 1:], plain[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[0][:, 1:], plain[1])
    assert torch.equal(ours[2], plain[2])


def test_former_loops_as_the_counterpart(tmp_path, monkeypatch, capsys):
    before = tmp_path / "before.py"
    before.write_text(
        "from vllm_dlm.kernels import numba_rows\n"
        "AVAILABLE, reads, calls = True, numba_rows.reads, []\n"
        "def row_parts(*arguments):\n"
        "    calls.append(arguments)\n"
        "    return numba_rows.row_parts(*arguments)\n"
    )
    loops = kernels._loops(before)
    monkeypatch.setattr(kernels, "_loops", lambda path: loops)
    threads = torch.get_num_threads()
    try:
        arguments = ["--kernels", "token_stats", "--dtypes", "float32"]
        arguments += ["--shapes", "2x50", "--repeats", "2", "--device", "cpu"]
        assert kernels.main([*arguments, "--against", str(before)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert len(loops.calls) == kernels.TURNS + 2
    assert "before, ms" in capsys.readouterr().out


def test_no_file_of_loops(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--against", "nowhere.py"])
    assert "'nowhere.py' is no Python file" in capsys.readouterr().err


def test_a_shape_that_is_none(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--shapes", "32"])
    assert "rows and vocabulary as in 32x32000" in capsys.readouterr().err
