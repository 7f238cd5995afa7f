# SPDX-License-Identifier: Apache-2.0
"""Draw the canvas of one request filling up, as an animated SVG: the README's picture.

The request is decoded once by each of two strategies. Every token appears in the step
in which its strategy wrote it, so the picture shows real decodes, one frame per
forward. The animation is CSS inside the file; a reader who asks for no motion sees the
finished canvas.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.decodes import END, MAX_TOKENS, QUESTION, Step, decode, read_steps
from benchmarks.engine import start_engine
from vllm_dlm import trajectories

PICTURE = Path(__file__).resolve().parents[1] / "docs/pictures/canvas.svg"
STRATEGIES = {
    "static": "the most confident token of each step",
    "threshold": "every token that is at least 90 % probable",
}
SECONDS_PER_STEP, STEPS_AT_THE_END = 0.3, 8
CELL, GAP, MARGIN, LETTER = 22, 3, 16, 8.5
"""Pixels: height of a cell, between cells, around all, and width of a letter."""
ROW = 66
STYLE = """
text { font: 14px ui-monospace, monospace; fill: #1f2933; }
.note { fill: #52606d; }
.cell { text-anchor: middle; }
rect.cell { fill: #d9f0e3; }
g * { animation: SECONDSs step-end infinite; }
@media (prefers-reduced-motion: reduce) { g * { animation: none !important; } }
"""


@dataclass(frozen=True)
class Decode:
    """How one strategy filled the canvas."""

    strategy: str
    cells: list[str]
    """The finished answer, a text for each position."""
    written: list[int]
    """The step that wrote each position for the last time."""
    num_steps: int

    @classmethod
    def of(cls, strategy: str, steps: Sequence[Step]) -> Decode:
        """Read off the steps when each position got its token."""
        last = steps[-1].cells
        written = [
            max(
                step.number
                for step in steps
                if step.marks[i : i + 1] not in ([], [" "])
            )
            for i in range(len(last))
        ]
        return cls(strategy, last, written, len(steps))


def main() -> int:
    """Decode the request with each strategy, and write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.picture", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=PICTURE, metavar="FILE")
    output = parser.parse_args().output
    decodes = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        llm = start_engine(folder, max_num_seqs=1, dlm_trajectory_dir=str(log))
        for strategy in STRATEGIES:
            decode(llm, {"strategy": strategy})
            *_, trajectory = trajectories.read(log)
            steps = list(read_steps(trajectory, llm.get_tokenizer()))
            decodes.append(Decode.of(strategy, steps))
        llm.llm_engine.engine_core.shutdown()
    output.write_text(draw(decodes), encoding="utf-8")
    for made in decodes:
        print(f"{made.strategy}: {made.num_steps} steps")
    return 0


def draw(decodes: Sequence[Decode]) -> str:
    """The picture: a row of cells for each decode, one clock for all."""
    num_steps = max(decode.num_steps for decode in decodes)
    frames = num_steps + 1 + STEPS_AT_THE_END
    style = STYLE.strip().replace("SECONDS", f"{frames * SECONDS_PER_STEP:g}")
    moments = sorted({step for decode in decodes for step in decode.written})
    rules = "\n".join(_keyframes(step, frames) for step in moments)
    rows = [_row(decode, MARGIN + 30 + i * ROW) for i, decode in enumerate(decodes)]
    width = max(right for _, right in rows) + MARGIN
    height = MARGIN + 30 + len(rows) * ROW
    lines = "\n".join(row for row, _ in rows)
    title = escape(
        f"{QUESTION}: {MAX_TOKENS} masks become an answer ({END} ends the text)"
    )
    size = f'width="{width:g}" height="{height:g}"'
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:g} {height:g}">
<title>{title}</title>
<style>
{style}
{rules}
</style>
<rect {size} rx="8" fill="#ffffff" stroke="#cbd2d9"/>
<text x="{MARGIN}" y="{MARGIN + 12}">{title}</text>
{lines}
</svg>
"""


def _keyframes(step: int, frames: int) -> str:
    """The life of a cell that a step writes: masked, just written, written."""
    # Frame 0 is the canvas before the first step.
    now, next_ = (round(100 * (step + i) / frames, 2) for i in (1, 2))
    fill = (
        f"0%{{fill:#e4e7eb}}{now:g}%{{fill:#ffc94d}}{next_:g}%{{fill:#d9f0e3}}"
        "100%{fill:#d9f0e3}"
    )
    shown = f"0%{{opacity:0}}{now:g}%{{opacity:1}}100%{{opacity:1}}"
    return (
        f"@keyframes f{step}{{{fill}}}\n@keyframes o{step}{{{shown}}}\n"
        f".s{step} rect{{animation-name:f{step}}}"
        f".s{step} text{{animation-name:o{step}}}"
    )


def _row(decode: Decode, top: float) -> tuple[str, float]:
    """One decode's label and cells, and where its last cell ends."""
    forwards = f"{decode.num_steps} forward{'s' * (decode.num_steps != 1)}"
    note = escape(f"{decode.strategy}, {forwards}: {STRATEGIES[decode.strategy]}")
    lines = [f'<text class="note" x="{MARGIN}" y="{top + 14:g}">{note}</text>']
    left: float = MARGIN
    for cell, step in zip(decode.cells, decode.written, strict=True):
        width = max(CELL - 4, LETTER * len(cell) + 8)
        lines.append(
            f'<g class="s{step}"><rect class="cell" x="{left:g}" y="{top + 22:g}" '
            f'width="{width:g}" height="{CELL}" rx="3"/><text class="cell" '
            f'x="{left + width / 2:g}" y="{top + 38:g}">{escape(cell)}</text></g>'
        )
        left += width + GAP
    return "\n".join(lines), left - GAP


if __name__ == "__main__":
    sys.exit(main())
