# SPDX-License-Identifier: Apache-2.0
"""The comparison of wide canvases: valid requests, and right numbers."""

import sys
from pathlib import Path

import pytest

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import ends  # noqa: E402

sys.path.pop()

LLADA = ModelDefaults("threshold", 32, mask_token_id=5)


@pytest.mark.parametrize("setting", ends.SETTINGS, ids=lambda one: one.label)
def test_requests_are_valid(setting: ends.Setting):
    config = resolve(DlmConfig(), {"dlm": setting.options}, LLADA)
    assert f"`{config.strategy}`" in setting.label
    assert config.eotp in setting.label or config.eotp == "off"


def test_rows_are_compared_with_the_published_loop():
    static = ends.Row("`static`", 10, 9, 40.0, 41_000.0)
    first = ends.published(static, 20.0, 1000)
    lines = ends._table([first, static], 1000, 32).splitlines()
    assert lines[-2:] == [
        "| `static`, the published loop | 90.0% | 1,000.0 | 1.0x | 1,020,000 | 1.0x |",
        "| `static` | 90.0% | 40.0 | 25.0x | 41,000 | 24.9x |",
    ]
