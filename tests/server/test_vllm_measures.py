# SPDX-License-Identifier: Apache-2.0
"""vLLM's own commands that measure and work off files, on our models."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from server.launch import MODEL, SIZES, Server

from vllm_dlm.cli.server_process import VLLM
from vllm_dlm.config.aliases import local_folder

pytestmark = pytest.mark.slow

WORK = (
    *("--dataset-name", "random", "--num-prompts", "6"),
    *("--random-input-len", "16", "--random-output-len", "32"),
)
# These commands read it themselves, and do not know our short names.
TOKENIZER = ("--tokenizer", str(local_folder(MODEL)))
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1"}


def run(*command: str) -> str:
    """What a command of vLLM's prints."""
    done = subprocess.run(
        [VLLM, *command],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **SMALL},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_bench_serve(server: Server, tmp_path: Path):
    """Every request has all its tokens, with the options of its body."""
    rows = {}
    for strategy in ("static", "threshold"):
        (before,) = server.metrics("dlm:rows_total")
        run(
            *("bench", "serve", "--backend", "openai", "--base-url", server.url),
            *("--model", MODEL, *TOKENIZER, *WORK),
            *("--ignore-eos", "--temperature", "0", "--max-concurrency", "2"),
            *("--extra-body", json.dumps({"vllm_xargs": {"dlm_strategy": strategy}})),
            *("--save-result", "--result-dir", str(tmp_path)),
            *("--result-filename", f"{strategy}.json"),
        )
        found = json.loads((tmp_path / f"{strategy}.json").read_text())
        assert found["completed"] == 6
        assert found["total_output_tokens"] == 6 * 32
        assert found["mean_ttft_ms"] > 0
        (after,) = server.metrics("dlm:rows_total")
        rows[strategy] = after - before
    # One token in each step, and every step computes prompt and canvas.
    assert rows["static"] >= 6 * 32 * (16 + 32)
    assert rows["threshold"] < rows["static"]


def test_bench_throughput(tmp_path: Path):
    path = tmp_path / "throughput.json"
    run(
        *("bench", "throughput", "--model", MODEL, *WORK, *SIZES, *TOKENIZER),
        *("--max-model-len", "512", "--output-json", str(path)),
    )
    found = json.loads(path.read_text())
    assert found["num_requests"] == 6
    # Prompts and answers.
    assert found["total_num_tokens"] == 6 * (16 + 32)


def test_run_batch(tmp_path: Path):
    """Bodies as over HTTP; one that is wrong spoils no other."""
    chat = [{"role": "user", "content": "Reverse [Ada, Ben, Carl]"}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": chat, "max_tokens": 32}),
        (
            "/v1/chat/completions",
            {"messages": chat, "vllm_xargs": {"dlm_strategy": "no such"}},
        ),
    ]
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = (
        {
            "custom_id": str(number),
            "method": "POST",
            "url": url,
            "body": {"model": MODEL, "temperature": 0, **body},
        }
        for number, (url, body) in enumerate(bodies)
    )
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(
        *("run-batch", "-i", str(asked), "-o", str(answered), "--model", MODEL),
        *(*SIZES, "--max-model-len", "512"),
    )
    found = {
        line["custom_id"]: line
        for line in map(json.loads, answered.read_text().splitlines())
    }
    body = found["0"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "[Carl, Ben, Ada]"
    assert found["1"]["response"]["status_code"] == 400
    assert "no such" in json.dumps(found["1"])
