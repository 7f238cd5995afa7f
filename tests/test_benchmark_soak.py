# SPDX-License-Identifier: Apache-2.0
"""benchmarks/soak.py: a short run of it, and that it finds what it looks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import soak  # noqa: E402
from benchmarks.soak_load import MODELS, make_jobs  # noqa: E402

sys.path.pop()

SOUND = {
    "minutes": 10.0,
    "wrong": [],
    "preemptions": 3,
    "broken": 0,
    "unmatched": 0,
    "memory_mib": {"engine": {"growth": 5.0}},
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"wrong": ["another text"]}, "another text"),
        ({"preemptions": 0}, "the load was too small"),
        ({"broken": 1}, "broken 1"),
        ({"memory_mib": {"engine": {"growth": 17.0}}}, "the engine grew by 17.0 MiB"),
        ({"memory_mib": {"engine": {"growth": 17.0}}, "minutes": 9.0}, None),
    ],
)
def test_what_is_not_as_it_should_be(change: dict, found: str | None):
    complaints = soak.judge(SOUND | change, 16.0)
    assert bool(complaints) == (found is not None)
    assert found is None or found in complaints[0]


@pytest.mark.parametrize("model", MODELS)
def test_jobs_are_the_same_every_time(model: str):
    jobs = make_jobs(model, 84, 1)
    assert jobs == make_jobs(model, 84, 1) != make_jobs(model, 84, 2)
    assert len({job.path for job in jobs}) == 4
    assert all(job.body["temperature"] == 0 or "seed" in job.body for job in jobs)
    asked = {job.body.get("vllm_xargs", {}).get("dlm_strategy") for job in jobs}
    assert ("eoser" in asked) == MODELS[model].full_attention


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("model", ["llada-tiny", "sdar-tiny"])
def test_two_minutes(model: str, tmp_path: Path):
    path = tmp_path / "report.json"
    status = soak.main(["--model", model, "--minutes", "2", "--report", str(path)])
    report = json.loads(path.read_text())
    assert status == 0, report["wrong"]
    assert report["asked"].keys() == {"left", "refused", "slow", "streamed", "whole"}
    assert report["different_answers"] > 40
