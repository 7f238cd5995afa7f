# SPDX-License-Identifier: Apache-2.0
"""Filters and a table of frequencies in the folders of random checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from reference.cached_procedures import ALL_CACHES

FILTER_BLOCKS = (8, 12, 16, 32)
"""Block lengths that have a Learn2PD filter."""

FREQUENCIES = torch.rand(100, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-5
FREQUENCIES /= FREQUENCIES.sum()
"""Of the first 100 token ids: the random checkpoints have more."""


def filter_weights(block: int) -> dict[str, torch.Tensor]:
    """A random Learn2PD filter, near the identity: some positions pass, some do not.

    Every position weighs on every other: a wrong or missing confidence shows.
    """
    generator = torch.Generator().manual_seed(block)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "w1": torch.eye(block) + 0.05 * noise(block, block),
        "b1": 0.05 * noise(block),
        "w2": 12 * torch.eye(block) + 0.3 * noise(block, block),
        "b2": -5.0 + 0.3 * noise(block),
    }


def write_filters(folder: Path) -> None:
    """Where an engine that serves `folder` finds them."""
    from vllm_dlm.strategies.learn2pd_filter import Filter

    for block in FILTER_BLOCKS:
        for cache in ALL_CACHES:
            name = f"learn2pd/b{block}-{cache}.safetensors"
            Filter(**filter_weights(block), cache=cache).save(folder / name)


def write_frequencies(folder: Path) -> None:
    """A table for `pc`, where an engine that serves `folder` finds it."""
    from vllm_dlm.strategies.token_frequencies import save_frequencies

    save_frequencies(folder / "pc" / "frequencies.safetensors", FREQUENCIES, {})
