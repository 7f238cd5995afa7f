# SPDX-License-Identifier: Apache-2.0
"""Tiny random models and shared engines for speculative decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.harness import end
from spec_decode.harness import Engine, write_llama


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers over 64 tokens."""
    return write_llama(tmp_path_factory.mktemp("target"), seed=0, num_layers=4)


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller one of the same vocabulary."""
    return write_llama(
        tmp_path_factory.mktemp("draft"), seed=1, num_layers=1, hidden_size=64
    )


@pytest.fixture(scope="session")
def engines(target: Path) -> Iterator[Callable[..., Engine]]:
    """`engines(speculative, **options)`: that engine of `target`, started once."""
    started: dict[str, Engine] = {}

    def engine(
        speculative: dict[str, Any] | None = None,
        model: Path = target,
        **options: Any,
    ) -> Engine:
        key = repr((speculative, model, sorted(options.items())))
        if key not in started:
            started[key] = Engine(model, speculative, **options)
        return started[key]

    yield engine
    end(started)


@pytest.fixture(scope="session")
def plain(engines: Callable[..., Engine]) -> Engine:
    """The target without speculation."""
    return engines()
