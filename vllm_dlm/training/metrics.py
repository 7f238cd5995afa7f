# SPDX-License-Identifier: Apache-2.0
"""What each step of a training measured: lines of JSON, and dashboards where wanted."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

from vllm_dlm.files.whole_files import parse_json, read_lines, write_text

METRICS = "metrics.jsonl"
"""Name of the file of metrics in the folder of the model that is trained."""

REPORTERS = ("tensorboard", "wandb")
"""What `--report-to` may name."""


class Reporter(Protocol):
    """A dashboard."""

    def write(self, step: int, measures: Mapping[str, float]) -> None:
        """Show a step's measures."""

    def close(self) -> None:
        """Write what is still held back."""


class Metrics:
    """Writes each step's measures to `metrics.jsonl`, one JSON object a line.

    Args:
        output_dir: Folder of the model.
        report_to: Of `REPORTERS`, each of which is installed.
        config: The run's options, for dashboards.

    Raises:
        ValueError: a dashboard is unknown or not installed, or the file is damaged.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = Path(output_dir)
        path = self._folder / METRICS
        self._known = read_metrics(path) if path.exists() else []
        self._reporters = [
            _open_reporter(name, self._folder, config or {}) for name in report_to
        ]
        self._file: TextIO | None = None
        self._before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """That the steps took, over all runs."""
        return self._before + time.monotonic() - self._started

    def write(self, step: int, measures: Mapping[str, float]) -> None:
        """Record the measures of a step, counted from 1.

        With a run's first step, lines of this and later ones, which an interrupted run
        has written behind its last checkpoint, are dropped.
        """
        if self._file is None:
            kept = [line for line in self._known if line["step"] < step]
            self._before = float(kept[-1].get("seconds", 0.0)) if kept else 0.0
            path = self._folder / METRICS
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a", encoding="utf-8")
        line = {"step": step, **measures, "seconds": round(self.seconds, 3)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for reporter in self._reporters:
            reporter.write(step, measures)

    def close(self) -> None:
        """End the file and the dashboards."""
        if self._file is not None:
            self._file.close()
        for reporter in self._reporters:
            reporter.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of metrics.

    The last line may be cut short, where a run was killed: it is left out.

    Raises:
        ValueError: it cannot be read, or another line is no object with a step.
    """
    lines = list(read_lines(path, "metrics"))
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line)
            if not isinstance(value, dict) or not isinstance(value.get("step"), int):
                raise ValueError("expected an object with a step")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
        found.append(value)
    return found


def check_reporters(names: Sequence[str]) -> None:
    """Refuse dashboards that cannot be written to.

    Raises:
        ValueError: one is unknown or not installed.
    """
    for name in names:
        if name not in REPORTERS:
            raise ValueError(f"--report-to is {' or '.join(REPORTERS)}, not {name!r}")
        if find_spec(name) is None:
            raise ValueError(
                f"--report-to {name}: it is not installed; pip install {name}, or "
                f"leave the option out: {METRICS} has the same numbers"
            )


def _open_reporter(name: str, folder: Path, config: Mapping[str, Any]) -> Reporter:
    check_reporters([name])
    if name == "tensorboard":
        return _TensorBoard(folder)
    return _WeightsAndBiases(folder, config)


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, measures: Mapping[str, float]) -> None:
        for name, value in measures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project="vllm-dlm",
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config={name: str(value) for name, value in config.items()},
        )

    def write(self, step: int, measures: Mapping[str, float]) -> None:
        self._run.log(dict(measures), step=step)

    def close(self) -> None:
        self._run.finish()
