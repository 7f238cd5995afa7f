# SPDX-License-Identifier: Apache-2.0
"""The table of published systems: what is asked is valid, and the first row counts."""

import sys
from pathlib import Path

import pytest

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve

sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import fidelity, tables  # noqa: E402

sys.path.pop()

LLADA = ModelDefaults("threshold", 32, mask_token_id=5)


@pytest.mark.parametrize("item", fidelity.ITEMS, ids=lambda item: item.title)
def test_requests_are_valid(item: fidelity.Item):
    assert len(item.rows) > 1
    decided = [
        resolve(DlmConfig(), {"dlm": options}, LLADA) for options in item.rows.values()
    ]
    assert all(config.strategy for config in decided)


def test_rows_are_compared_with_the_first():
    item = fidelity.ITEMS[0]
    served = [
        fidelity.Served(10, right, forwards, 100, 1.0)
        for right, forwards in ((10, 320), (9, 16))
    ]
    labels = list(item.rows)
    rows = [
        fidelity.Row(item.title, labels[0], served[0], 20_000),
        fidelity.Row(item.title, labels[1], served[1], 500),
    ]
    lines = fidelity._table(item, rows).splitlines()
    assert lines[4] == f"| {labels[0]} | 100.0% | 32.00 | 1.0x | 2,000 | 1.0x |"
    assert lines[5] == f"| {labels[1]} | 90.0% | 1.60 | 20.0x | 50 | 40.0x |"


def test_the_document_has_a_place_for_the_tables():
    text = (tables.ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
    assert [text.count(line) for line in tables.MEASURED] == [1, 1]
