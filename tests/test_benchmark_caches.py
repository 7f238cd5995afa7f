# SPDX-License-Identifier: Apache-2.0
"""The comparison of cache policies: valid requests, right numbers, a kept reading."""

import sys
from pathlib import Path

import pytest

from vllm_dlm.config import DlmConfig
from vllm_dlm.model_defaults import ModelDefaults
from vllm_dlm.model_executor.cache import POLICIES
from vllm_dlm.request_config import resolve

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import caches  # noqa: E402

sys.path.pop()

LLADA = ModelDefaults("threshold", 32, mask_token_id=5, eos_token_id=6)


@pytest.mark.parametrize("workload", caches.WORKLOADS, ids=lambda one: one.title)
@pytest.mark.parametrize("policy", POLICIES)
def test_workloads_are_valid(workload: caches.Workload, policy: str):
    options = workload.options | {"cache": policy}
    assert resolve(DlmConfig(), {"dlm": options}, LLADA).cache == policy


def test_the_table_compares_rows_with_the_first_policy():
    workload = caches.WORKLOADS[0]
    rows = [
        caches.Row(policy, workload, caches.Served(10, right, 320, 100, 1.0), count)
        for policy, right, count in (("none", 10, 20_000), ("dual", 9, 5_000))
    ]
    lines = caches._table(workload, rows).splitlines()
    assert lines[-2:] == [
        "| `none` | 100.0% | 32.00 | 2,000 | 100% |",
        "| `dual` | 90.0% | 32.00 | 500 | 25% |",
    ]


def test_writing_keeps_what_is_around_the_tables(tmp_path: Path):
    path = tmp_path / "caches.md"
    path.write_text(f"Head.\n{caches.BEGIN}\nold\n{caches.END}\nReading.\n")
    for tables in ("first", "second"):
        caches._write(path, tables)
    assert path.read_text() == (
        f"Head.\n{caches.BEGIN}\n\nsecond\n\n{caches.END}\nReading.\n"
    )
    path.write_text("no such lines\n")
    with pytest.raises(ValueError, match=caches.BEGIN):
        caches._write(path, "tables")
