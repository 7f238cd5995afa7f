# SPDX-License-Identifier: Apache-2.0
"""Counters on /metrics are exact: what one request costs, to the row."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from server.launch import REPLY_SECONDS, Server

BOARD = Path(__file__).parents[2] / "deploy/grafana/vllm-dlm.json"
NAMES = (
    "diffusion_num_denoising_steps_total",
    "dlm:rows_total",
    "dlm:lm_head_rows_total",
)


def test_work_of_a_request(server: Server):
    """32 steps of one token: rows are prompt and canvas, lm_head's the masks left."""
    server.wait_until_idle()
    before = server.metrics(*NAMES)
    reply = server.complete(
        "Copy [Ada, Ben]",
        max_tokens=32,
        ignore_eos=True,
        vllm_xargs={"dlm_strategy": "static", "dlm_block_length": 32, "dlm_steps": 32},
    )
    server.wait_until_idle()
    after = server.metrics(*NAMES)
    steps, rows, head_rows = (b - a for a, b in zip(before, after, strict=True))
    assert steps == 32
    assert rows == 32 * (reply.usage.prompt_tokens + 32)
    assert head_rows == sum(range(1, 33))


def test_the_board_asks_for_metrics_that_there_are(server: Server):
    """Names, and the labels by which they are chosen, grouped and shown."""
    text = httpx.get(f"{server.url}/metrics", timeout=REPLY_SECONDS).text
    exported: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    board = json.loads(BOARD.read_text())
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    assert len(targets) > len(board["panels"]) > 10
    for target in targets:
        expression = target["expr"]
        metrics = re.findall(r"\b(?:vllm|dlm):\w+", expression)
        labels = set(re.findall(r"[{,]\s*(\w+)\s*=~?", expression))
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            labels |= set(re.split(r",\s*", grouped))
        labels |= set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert metrics, expression
        for metric in metrics:
            assert metric in exported, metric
            assert labels <= exported[metric], (metric, labels)
    (variable,) = board["templating"]["list"]
    metric, label = re.fullmatch(
        r"label_values\((\S+), (\w+)\)", variable["query"]
    ).groups()
    assert label in exported[metric]
