# SPDX-License-Identifier: Apache-2.0
"""The comparison of cache policies: valid requests, right numbers, a kept reading."""

import sys
from pathlib import Path

import pytest

from vllm_dlm.config.cache import POLICIES
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import caches, tables  # noqa: E402

sys.path.pop()

LLADA = ModelDefaults("threshold", 32, mask_token_id=5)


@pytest.mark.parametrize("workload", caches.WORKLOADS, ids=lambda one: one.title)
@pytest.mark.parametrize("setting", caches.SETTINGS, ids=lambda one: one.label)
def test_requests_are_valid(workload: caches.Workload, setting: caches.Setting):
    options = {"cache": setting.cache, "cache_config": setting.config}
    config = resolve(DlmConfig(), {"dlm": workload.options | options}, LLADA)
    assert config.cache == setting.cache


def test_every_policy_is_measured_by_default():
    assert [one.cache for one in caches.SETTINGS if not one.config] == list(POLICIES)


def test_the_table_compares_rows_with_the_first_policy():
    workload = caches.WORKLOADS[0]
    rows = [
        caches.Row(setting, workload, caches.Served(10, right, 320, 100, 1.0), count)
        for setting, right, count in (
            (caches.Setting("none"), 10, 20_000),
            (caches.Setting("vicinity", {"look_back": 4}), 9, 5_000),
        )
    ]
    lines = caches._table(workload, rows).splitlines()
    assert lines[-2:] == [
        "| `none` | 100.0% | 32.00 | 2,000 | 100% |",
        "| `vicinity`, look_back 4 | 90.0% | 32.00 | 500 | 25% |",
    ]


def test_writing_keeps_what_is_around_the_tables(tmp_path: Path):
    path, (begin, end) = tmp_path / "caches.md", tables.MEASURED
    path.write_text(f"Head.\n{begin}\nold\n{end}\nReading.\n")
    for text in ("first", "second"):
        tables.write_between(path, tables.MEASURED, text)
    assert path.read_text() == f"Head.\n{begin}\n\nsecond\n\n{end}\nReading.\n"
    path.write_text("no such lines\n")
    with pytest.raises(ValueError, match=begin):
        tables.write_between(path, tables.MEASURED, "tables")
