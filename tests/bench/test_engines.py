# SPDX-License-Identifier: Apache-2.0
"""Whole runs with vLLM: ours beside an autoregressive model, and a server over HTTP."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench.conftest import TINY
from reference.diffusion_gemma import write_torchvision_stand_in
from server.launch import COMMAND, running_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
VLLM_DLM = str(Path(sys.executable).with_name("vllm-dlm"))


def run(*arguments: str, file: Path, **variables: str) -> list[dict[str, Any]]:
    """The cells of a run in a process of its own, as a user has it.

    Args:
        variables: of its environment.
    """
    environment = dict(os.environ) | variables
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    always = ("--json", str(file), "--threads", "1", "--dtype", "float32")
    subprocess.run(
        [VLLM_DLM, "bench", *always, *arguments], check=True, env=environment
    )
    return json.loads(file.read_text())["cells"]


@pytest.mark.parametrize("mode", ["serve", "offline"])
def test_ours_beside_an_autoregressive_model(tmp_path, mode):
    cells = run(
        *("--model", TINY, "--prompt-len", "16", "--max-tokens", "32", "--mode", mode),
        *("--block-length", "8", "--steps", "16", "--concurrency", "1,4"),
        *("--strategies", "static", "--caches", "none,dual", "--against", "ar"),
        *("--engine-option", "enforce_eager=true"),
        file=tmp_path / "results.json",
    )
    ours = [cell for cell in cells if cell["engine"] == "vllm-dlm"]
    others = [cell for cell in cells if cell["engine"] == "ar"]
    assert [(c["cache"], c["concurrency"]) for c in ours] == [
        *(("none", 1), ("none", 4), ("dual", 1), ("dual", 4))
    ]
    assert [cell["concurrency"] for cell in others] == [1, 4]
    for cell in cells:
        assert cell["tokens"] == 32 * cell["requests"]
        assert cell["cpu_seconds"] > 0 and cell["peak_memory_gib"] > 0
        assert cell["gflop_per_request"] > 0
        assert cell["sampling_seconds"] > 0
    for cell in ours:
        assert cell["forwards_per_request"] == 16
        rows = {"none": 16 * 48, "dual": 4 * (48 + 3 * 8)}[cell["cache"]]
        assert cell["counts"]["rows"] == rows * cell["requests"]
        assert cell["counts"]["head_rows"] == 4 * 20 * cell["requests"]
    for cell in others:
        assert cell["forwards_per_request"] == 32
        assert cell["counts"]["head_rows"] == 32 * cell["requests"]
        assert cell["counts"]["rows"] == (16 + 31) * cell["requests"]
    # A forward serves as many requests as there are.
    assert ours[1]["counts"]["forwards"] < ours[0]["counts"]["forwards"] * 2


def test_diffusion_gemma_by_vllms_own_code_and_by_ours(tmp_path):
    paths = [str(write_torchvision_stand_in(tmp_path / "packages"))]
    if importlib.util.find_spec("torchvision") is not None:
        paths = []
    paths += filter(None, [os.getenv("PYTHONPATH")])
    canvas, prompt, words, steps = 16, 8, 2003, 48
    model = f"random:d=64,layers=2,heads=2,mlp=96,vocab={words}"
    cells = run(
        *("--model", f"{model},family=diffusion_gemma", "--mode", "offline"),
        *("--block-length", str(canvas), "--prompt-len", str(prompt)),
        *("--max-tokens", str(2 * canvas), "--strategies", "renoise"),
        *("--against", "native", "--concurrency", "1,8", "--requests", "8"),
        *("--step-costs", "--engine-option", "enforce_eager=true"),
        file=tmp_path / "results.json",
        # What vLLM compiles even in an eager engine takes longer than all the rest.
        TORCHDYNAMO_DISABLE="1",
        PYTHONPATH=os.pathsep.join(paths),
    )
    ours, native = cells[:2], cells[2:]
    assert [cell["engine"] for cell in cells] == ["vllm-dlm"] * 2 + ["native"] * 2
    assert all(cell["tokens"] == 8 * 2 * canvas for cell in cells)
    # One request at a time: the next canvas' first step computes the last one's keys.
    denoised = 2 * steps
    counts, others = ours[0]["counts"], native[0]["counts"]
    assert ours[0]["forwards_per_request"] == denoised
    assert counts["forwards"] == 8 * denoised
    assert counts["rows"] == 8 * (denoised * canvas + prompt + canvas)
    assert counts["head_rows"] == 8 * denoised * canvas
    # A forward for the prompt, and one for the keys of each canvas.
    assert others["forwards"] == 8 * (1 + denoised + 2)
    assert others["rows"] == 8 * (prompt + (denoised + 2) * canvas)
    # All canvases' logits are there at once, and their probabilities.
    logits = canvas * words * 4 / 2**20
    few, many = (cell["sampling_mib"] for cell in native)
    assert few >= 2 * logits and many - few >= 7 * 2 * logits
    for cell in cells:
        assert cell["launches_per_step"] > 0 and cell["state_mib"] > 0


def test_a_server_over_http(tmp_path):
    with running_server(COMMAND, tmp_path / "log") as server:
        cells = run(
            *("--model", "llada-tiny", "--max-tokens", "64", "--requests", "8"),
            *("--strategies", "static,threshold", "--concurrency", "1,4"),
            *("--skip-ours", "--adapter-option", f"url={server.url}/v1"),
            *("--adapter-option", "xargs=dlm", "--against"),
            f"adapter:{ROOT / 'benchmarks/openai_endpoint.py'}:OpenAIEndpoint",
            file=tmp_path / "results.json",
        )
    assert [(c["strategy"], c["concurrency"]) for c in cells] == [
        *(("static", 1), ("static", 4), ("threshold", 1), ("threshold", 4))
    ]
    for cell in cells:
        assert cell["accuracy"] == 1.0
        assert cell["tokens_per_forward"] is None
        assert 0 < cell["first_token_p50"] <= cell["first_token_p99"]
    assert len({cell["tokens"] for cell in cells}) == 1
