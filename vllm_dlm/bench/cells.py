# SPDX-License-Identifier: Apache-2.0
"""What a run consists of, and the JSON file its results are kept in.

A cell is one engine, strategy, cache policy and concurrency. Its key names all that
its result depends on but the machine; a run that resumes a file skips the keys in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from vllm_dlm.files.whole_files import (
    checked,
    open_file,
    parse_json,
    read_text,
    write_json,
)
from vllm_dlm.model_executor.model_key import weights_digest

VERSION = 1
"""Version of the JSON file's layout."""


@dataclass(frozen=True)
class Cell:
    """What one measurement is of."""

    engine: str
    """"vllm-dlm", "plain", "ar", "native" or an adapter's spec."""
    dtype: str
    concurrency: int
    strategy: str = ""
    strategy_config: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "none"
    cache_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """Strategy, its parameters and the cache policy, in words."""
        if not self.strategy:
            return "autoregressive" if self.engine == "ar" else "its own"
        settings = (
            (self.strategy, self.strategy_config),
            (self.cache, self.cache_config),
        )
        return ", ".join(
            ":".join([name, *(f"{key}={value}" for key, value in params.items())])
            for name, params in settings
        )

    def described(self) -> dict[str, Any]:
        """What identifies the cell, as its result names it."""
        return {
            "engine": without_folders(self.engine),
            "dtype": self.dtype,
            "setting": self.setting,
            "strategy": self.strategy,
            "strategy_config": dict(self.strategy_config),
            "cache": self.cache,
            "cache_config": dict(self.cache_config),
            "concurrency": self.concurrency,
        }

    def key(self, run: Mapping[str, Any]) -> str:
        """Names the cell and what of the run it depends on."""
        return json.dumps({**run, **self.described()}, sort_keys=True)


def model_name(model: str) -> str:
    """A model without the folder that it lies in; a hub id has a slash too."""
    return Path(model).name if Path(model).is_dir() else model


def without_folders(value: Any) -> Any:
    """A value as it goes into the file: of paths in it, the last part only."""
    if isinstance(value, Mapping):
        return {name: without_folders(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(part) for part in value]
    if isinstance(value, Path) or (isinstance(value, str) and os.sep in value):
        kind, colon, path = str(value).rpartition("adapter:")
        return kind + colon + Path(path).name
    return value


def digest(value: Any) -> str:
    """16 hex digits that tell values apart; of a path in them, what lies there."""
    return sha256(json.dumps(_contents(value)).encode()).hexdigest()[:16]


def _contents(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _contents(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_contents(part) for part in value]
    if isinstance(value, (str, Path)):
        path = str(value).removeprefix("adapter:")
        # Not every text may be a file's name: these say no where `Path` raises.
        if os.path.isdir(path):
            return weights_digest(Path(path))
        if os.path.isfile(path):
            with open_file(path, "input") as file:
                return file_digest(file, "sha256").hexdigest()
        return str(value)
    return value


_Number = Annotated[float, Field(allow_inf_nan=False)]


class _StoredCell(BaseModel):
    """A cell of the JSON file: what the tables read of it. All else is numbers."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Number | None] = Field(init=False)

    key: str
    engine: str
    dtype: str
    setting: str
    concurrency: Annotated[int, Field(ge=1)]
    environment: Annotated[int, Field(ge=0)]
    strategy: str
    strategy_config: dict[str, Any]
    cache: str
    cache_config: dict[str, Any]
    counts: dict[str, Any] | None = None
    error: str | None = None
    # Of `vllm-dlm eval`.
    task: str | None = None
    metric: str | None = None


class _Stored(BaseModel):
    """The JSON file."""

    environments: list[dict[str, Any]]
    cells: Annotated[list[_StoredCell], FailFast()]


class Results:
    """The JSON file: `version`, `environments` and `cells`.

    Args:
        path: None keeps results in memory only.
        resume: go on with the cells of an existing file.
        environment: of this run; each cell refers to its own by number.

    Raises:
        ValueError: there is a file already and `resume` is off, or it is not ours.
    """

    def __init__(
        self, path: Path | None, *, resume: bool, environment: dict[str, Any]
    ) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "version": VERSION,
            "environments": [],
            "cells": [],
        }
        if path is not None and os.path.lexists(path):
            if not resume:
                raise ValueError(
                    f"--json {path} exists: pass --resume to go on with it, or "
                    "another name"
                )
            self.data = _read(path)
        self.data["environments"].append(environment)

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Results, in the order they were measured."""
        cells: list[dict[str, Any]] = self.data["cells"]
        return cells

    def has(self, key: str) -> bool:
        """Whether this cell is measured; one that failed is tried again."""
        return any(cell["key"] == key and "error" not in cell for cell in self.cells)

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, in place of an earlier one of its key, and write the file."""
        result = {**result, "environment": len(self.data["environments"]) - 1}
        kept = [cell for cell in self.cells if cell["key"] != result["key"]]
        self.data["cells"] = [*kept, result]
        if self.path is None:
            return
        # Whole or not at all: a run may be killed while it writes.
        write_json(self.path, self.data, indent=1)


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, "results (--json)")
    try:
        data = parse_json(text)
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise ValueError(f"version: expected an object with {VERSION}")
        checked(_Stored, data)
    except ValueError as error:
        raise ValueError(
            f"--json {path} is not a file of results, version {VERSION}: {error}"
        ) from None
    return data
