# SPDX-License-Identifier: Apache-2.0
"""Draw how each strategy decodes one request, into the strategies' pages.

A picture has a row per denoise step, with the answer as it stands after it:

    step 0   ›[     ·      ·     ·    ·      the step wrote `[`; the rest is masked
    step 1    [    ›Ada   ›,     ·   ›∎      a comma, a name, the end of the text

What follows the line `<!-- decode -->` of docs/strategies/NAME.md is replaced.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import start_engine
from vllm_dlm import trajectories

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs/strategies"
MARK = "<!-- decode -->"
QUESTION = "Shuffle [Ada, Ben, Carl, Dora, Emil]"
MAX_TOKENS = 32
MASK, END, NEW, CHANGED = "·", "∎", "›", "!"
WIDTH, ROWS = 88, 12
LEGEND = (
    f"`{MASK}` masked, `{NEW}` written by this step, `{CHANGED}` written before and "
    f"changed or masked again,\n`{END}` end of text. Made by "
    "`python -m benchmarks.decodes`."
)


@dataclass(frozen=True)
class Step:
    """One row of a picture."""

    number: int
    cells: list[str]
    """The answer after the step, a text per position."""
    marks: list[str]
    """What the step did to each position: `NEW`, `CHANGED` or a space."""


def main() -> int:
    """Decode the request with every strategy, and draw it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decodes", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--strategies", nargs="+", metavar="NAME", help="only these, not all"
    )
    wanted = parser.parse_args().strategies
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        llm = start_engine(
            folder, max_num_seqs=1, dlm_trajectory_dir=str(log), dlm_soft_inputs=True
        )
        tokenizer = llm.get_tokenizer()
        for name, options in _requests(llm):
            if wanted and name not in wanted:
                continue
            text = decode(llm, options)
            *_, trajectory = trajectories.read(log)
            steps = list(read_steps(trajectory, tokenizer))
            write(PAGES / f"{name}.md", text, draw(steps))
            print(f"{name}: {len(steps)} steps")
        llm.llm_engine.engine_core.shutdown()
    return 0


# -- the decodes ----------------------------------------------------------


def _requests(llm: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each strategy and the options of its request: defaults, where that is enough."""
    from vllm_dlm import step_map
    from vllm_dlm.strategies import STRATEGIES

    for name in STRATEGIES:
        if name == "levenshtein":
            continue  # Its page has edits by hand: llada-tiny has no tokens that edit.
        if STRATEGIES[name].verifies:
            continue  # for causal models
        options: dict[str, Any] = {"strategy": name}
        if name == "replay":
            # Of the threshold's decode, with its steps in reverse.
            recorded = _answer(llm, {"strategy": "threshold", "step_map": True})
            steps = step_map(recorded).steps
            options["strategy_config"] = {
                "recorded_steps": [max(steps) - s for s in steps]
            }
        if name == "multi_block":  # of llada-tiny's own length there would be one
            options["strategy_config"] = {"block": 8}
        yield name, options


def decode(llm: Any, options: dict[str, Any]) -> str:
    """The answer to the pictures' question, decoded with these options."""
    return _answer(llm, options).outputs[0].text


def _answer(llm: Any, options: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=MAX_TOKENS, extra_args={"dlm": options}
    )
    (answer,) = llm.generate([QUESTION], sampling, use_tqdm=False)
    return answer


def read_steps(trajectory: trajectories.Trajectory, tokenizer: Any) -> Iterator[Step]:
    """The rows of a picture, of all positions."""

    def text(token: int) -> str:
        if token == trajectory.mask:
            return MASK
        if token == tokenizer.eos_token_id:
            return END
        return tokenizer.decode([token]).strip() or "␣"

    before: list[int] = []
    for step in trajectory.steps():
        before += [trajectory.mask] * (len(step.canvas) - len(before))
        marks = [" "] * len(step.canvas)
        for position in step.changed:
            known = before[position] != trajectory.mask
            marks[position] = CHANGED if known else NEW
        yield Step(step.number, list(map(text, step.canvas)), marks)
        before = step.canvas


# -- the pictures ---------------------------------------------------------


def draw(steps: Sequence[Step]) -> str:
    """The picture of a decode: as much of the answer as fits, long runs folded."""
    # The answer, up to its end of text; what is behind that is padding.
    last = steps[-1].cells
    length = last.index(END) + 1 if END in last else len(last)
    widths = [
        max(len(step.cells[i]) for step in steps if i < len(step.cells)) + 2
        for i in range(length)
    ]
    label = len(f"step {steps[-1].number}") + 2
    while label + sum(widths) > WIDTH:
        widths.pop()
    shown = [step for step in steps if any(m != " " for m in step.marks[: len(widths)])]
    rows = [_row(step, widths, label) for step in shown]
    if len(rows) > ROWS:
        half = ROWS // 2
        rows = [*rows[:half], f"... {len(rows) - ROWS + 1} steps", *rows[1 - half :]]
    if len(shown) < len(steps):
        rows.append(f"steps that write none of these: {len(steps) - len(shown)}")
    return "\n".join(rows)


def _row(step: Step, widths: Sequence[int], label: int) -> str:
    cells = [
        (mark + cell).ljust(width)
        for cell, mark, width in zip(step.cells, step.marks, widths, strict=False)
    ]
    return f"{f'step {step.number}'.ljust(label)}{''.join(cells)}".rstrip()


def write(page: Path, answer: str, picture: str) -> None:
    """Put a picture behind the page's mark.

    Raises:
        ValueError: the page has no mark.
    """
    text = page.read_text(encoding="utf-8")
    head, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError(f"{page} has no line {MARK}")
    decode = (
        f"## A decode\n\nllada-tiny, `{QUESTION}`, {MAX_TOKENS} tokens: `{answer}`\n\n"
        f"```\n{picture}\n```\n\n{LEGEND}\n"
    )
    page.write_text(f"{head}{MARK}\n\n{decode}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
