# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: every strategy is measured, and the pictures show what happened."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.strategies import STRATEGIES

# They are no part of the package: found beside it, for this import only.
sys.path.append(str(Path(__file__).parent.parent))
from benchmarks import (  # noqa: E402
    decodes,
    picture,
    settings,
    soft_inputs,
    strategies,
)
from benchmarks.tables import save  # noqa: E402

sys.path.pop()

LLADA = ModelDefaults("threshold", 32, mask_token_id=5)
OURS = [name for name in STRATEGIES if STRATEGIES[name].__module__.startswith("vllm_")]


def test_every_strategy_is_measured_or_left_out_with_a_reason():
    measured = {setting.strategy for setting in settings.SETTINGS}
    assert measured | set(settings.LEFT_OUT) == set(OURS)
    assert not measured & set(settings.LEFT_OUT)


@pytest.mark.parametrize(
    "setting", settings.SETTINGS, ids=lambda one: f"{one.strategy}: {one.label}"
)
def test_settings_are_valid(setting):
    for workload in settings.WORKLOADS:
        if not setting.is_measured(workload):
            continue
        options = setting.request_options(workload)
        assert resolve(DlmConfig(), {"dlm": options}, LLADA).strategy


@pytest.mark.parametrize("label", soft_inputs.ROWS)
def test_rows_of_mixtures_are_valid(label):
    strategy, config = soft_inputs.ROWS[label]
    request = {"dlm": {"strategy": strategy, "strategy_config": config}}
    assert resolve(DlmConfig(soft_inputs=True), request, LLADA).strategy == strategy


def row(name: str, right: int, forwards: int) -> strategies.Row:
    served = strategies.Served(10, right, forwards, tokens=100, seconds=1.0)
    return strategies.Row(settings.Setting(name), settings.WORKLOADS[0], served, 1234)


def test_the_table_marks_what_nothing_beats():
    rows = [row("static", 10, 50), row("cad", 9, 50), row("eb", 8, 10)]
    table = strategies._table(rows, settings.WORKLOADS[0]).splitlines()[2:]
    assert [line.split("]")[0] for line in table] == ["| [eb", "| [static", "| [cad"]
    assert [line.endswith("* |") for line in table] == [True, True, False]
    assert "| 100.0% | 5.00 | 2.00 | 123 |" in table[1]


def test_writing_the_table_keeps_the_reading(tmp_path):
    path = tmp_path / "table.md"
    strategies._write(path, "old\n")
    path.write_text(path.read_text() + "\n## Reading\n\nBy hand.\n")
    strategies._write(path, "new\n")
    assert path.read_text() == "new\n<!-- reading -->\n\n## Reading\n\nBy hand.\n"


def test_a_run_goes_on_with_the_rows_of_its_file(tmp_path):
    """Those of settings that are measured still."""
    path = tmp_path / "rows.json"
    assert strategies._earlier(path) == []
    found = [row("static", 10, 50), row("threshold", 9, 20)]
    gone = strategies._facts(row("static", 1, 1)) | {"strategy": "gone"}
    save([*map(strategies._facts, found), gone], path)
    assert strategies._earlier(path) == found


def step(number: int, text: str, marks: str) -> decodes.Step:
    return decodes.Step(number, list(text), list(marks))


def test_a_picture_shows_what_each_step_did():
    steps = [
        step(0, "a···", "›   "),
        step(1, "a···", "    "),
        step(2, "·b∎·", "!›› "),
        step(3, "cb∎d", "›  ›"),
    ]
    assert decodes.draw(steps).splitlines() == [
        "step 0  ›a  ·  ·",
        "step 2  !· ›b ›∎",
        "step 3  ›c  b  ∎",
        "steps that write none of these: 1",
    ]


def test_a_long_picture_is_folded_and_a_wide_one_cut():
    texts = ["x" * done + "·" * (40 - done) for done in range(1, 41)]
    steps = [
        step(i, text, " " * i + "›" + " " * (39 - i)) for i, text in enumerate(texts)
    ]
    rows = decodes.draw(steps).splitlines()
    assert max(map(len, rows)) <= decodes.WIDTH
    assert len(rows) == decodes.ROWS + 1
    assert rows[decodes.ROWS // 2].startswith("... ")


def test_a_picture_replaces_the_one_before(tmp_path):
    page = tmp_path / "static.md"
    page.write_text("# static\n\nText.\n\n<!-- decode -->\nold\n")
    decodes.write(page, "[Ada]", "step 0")
    once = page.read_text()
    decodes.write(page, "[Ada]", "step 0")
    assert page.read_text() == once
    assert once.startswith("# static\n\nText.\n\n<!-- decode -->\n\n## A decode\n")
    assert "old" not in once
    page.write_text("# static\n")
    with pytest.raises(ValueError, match="has no line"):
        decodes.write(page, "[Ada]", "step 0")


SVG = "{http://www.w3.org/2000/svg}"


def test_the_moving_picture_shows_each_token_in_its_step():
    steps = [
        step(0, "a···", "›   "),
        step(1, "·b∎·", "!›› "),
        step(2, "cb∎d", "›  ›"),
    ]
    made = picture.Decode.of("threshold", steps)
    assert made == picture.Decode("threshold", list("cb∎d"), [2, 1, 1, 2], 3)
    svg = picture.draw([made, picture.Decode("static", list("<&"), [0, 1], 2)])
    cells = [
        (group.attrib["class"], group.find(f"{SVG}text").text)
        for group in ElementTree.fromstring(svg).iter(f"{SVG}g")
    ]
    assert cells[:4] == [("s2", "c"), ("s1", "b"), ("s1", "∎"), ("s2", "d")]
    assert cells[4:] == [("s0", "<"), ("s1", "&")]
    # All cells begin masked; a later step's appear later, and the clock is one.
    shown = re.findall(r"@keyframes o(\d)\{0%\{opacity:0\}([\d.]+)%", svg)
    assert [int(number) for number, _ in shown] == [0, 1, 2]
    times = [float(time) for _, time in shown]
    assert 0 < times[0] < times[1] < times[2] < 100


def test_the_picture_of_the_readme():
    text = picture.PICTURE.read_text(encoding="utf-8")
    assert len(text.encode()) < 30_000
    cells = ElementTree.fromstring(text).findall(f"{SVG}g")
    assert len(cells) == decodes.MAX_TOKENS * len(picture.STRATEGIES)
    for strategy in picture.STRATEGIES:
        assert f">{strategy}, " in text
