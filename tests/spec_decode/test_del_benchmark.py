# SPDX-License-Identifier: Apache-2.0
"""What `python -m benchmarks.exits` makes of recorded rounds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.exits import Phase, accepted, comparison, main, plot, table
from vllm_dlm.spec_decode.del_exit.exits import Choice
from vllm_dlm.spec_decode.del_exit.proposer import Round


def entry(num_tokens: int, exit: int, tokens: list[int]) -> Round:
    choice = Choice(exit, len(tokens), len(tokens), 0.5, 0.5)
    return Round("0", num_tokens, (0.5, 0.75), choice, tuple(tokens))


TEXT = [9, 9, 1, 2, 3, 4, 5, 6]
ROUNDS = [
    entry(3, 1, [2, 3, 8]),  # two of three, and 4 by verification
    entry(6, 2, []),
    entry(7, 2, [6, 7]),  # the text ends with its first
]


def test_accepted_tokens():
    assert [count for _, count in accepted(ROUNDS, TEXT)] == [2, 0, 1]


def phases() -> list[Phase]:
    rounds = accepted(ROUNDS, TEXT)
    return [Phase("add", rounds, 6, 4, 3 * 1 + 2 * 2), Phase("spell", rounds, 6, 6, 0)]


def test_table():
    assert phases()[0].layers_per_token(3) == (4 * 3 + 7) / 6
    heads, _, add, spell = table(phases(), num_layers=3).splitlines()
    assert heads.count("|") == add.count("|")
    assert add == "| add | 3 | 33% | 1: 50%, 2: 50% | 1.67 | 1.00 | 1.50 | 3.17 |"
    assert spell.endswith("| 1.00 | 3.00 |")


def test_comparison_of_rules():
    _, _, both, length = comparison(
        {"both": phases(), "length": phases()[1:]}, num_layers=3
    ).splitlines()
    # 12 tokens of 10 forwards, 10 drafted tokens and 37 layers; 6 of 6, 5 and 18.
    assert both == "| `both` | 1.20 | 1.00 | 60% | 0.973 |"
    assert length == "| `length` | 1.00 | 0.83 | 60% | 1.000 |"


def test_plot(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    plot(phases(), [1, 2], 3, tmp_path / "new" / "exits.png")
    assert (tmp_path / "new" / "exits.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_that_do_not_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["exits", "--tasks", "juggle"])
    with pytest.raises(SystemExit):
        main()
    assert "invalid choice: 'juggle'" in capsys.readouterr().err
