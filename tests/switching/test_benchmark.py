# SPDX-License-Identifier: Apache-2.0
"""The table and the rules of `python -m benchmarks.switching`."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from vllm_dlm.switching.entropy import make_rule

# No part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import switching  # noqa: E402

sys.path.pop()


def test_its_rules_are_valid():
    for window, min_tokens in switching.TURNS:
        for tau in switching.TAUS:
            make_rule(tau=tau, window=window, min_tokens=min_tokens)


def test_the_table():
    alone = switching.Row(
        *("large alone", None, None, None, 10, 9, 120, 120), *(120, 220, 0, 0, 1.0)
    )
    pair = switching.Row(*("pair", 2, 2, 0.1, 10, 8, 100, 25), *(30, 90, 66, 7, 1.0))
    table = switching._table(Namespace(small="a", large="b"), [alone, pair])
    assert table.splitlines()[-2:] == [
        "| large alone |  |  | 90.0% | 100% | 12.0 | 22.0 | 0.00 | 0.0 |",
        "| pair | 2, 2 | 0.1 | 80.0% | 25% | 3.0 | 9.0 | 0.70 | 6.6 |",
    ]
