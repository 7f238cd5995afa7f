# SPDX-License-Identifier: Apache-2.0
"""How often each token occurs in ordinary text: a table that `pc` reads.

A table's file is safetensors with the tensor `frequencies`, [V] float32: the share of
each token id in a corpus, over 0 and at most 1. `vllm-dlm count-tokens` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_dlm.strategies.base import Context

logger = logging.getLogger(__name__)

_TENSOR = "frequencies"


def save_frequencies(
    path: str | Path, frequencies: torch.Tensor, facts: Mapping[str, str]
) -> None:
    """Write a table [V] and what is known of it, as metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({_TENSOR: frequencies.float().contiguous()}, path, metadata=dict(facts))


def load_frequencies(path: str | Path) -> torch.Tensor:
    """Read a table, [V] float32, onto the CPU.

    Raises:
        ValueError: there is no such file, or it holds no such table.
    """
    try:
        with safe_open(path, framework="pt") as file:
            table: torch.Tensor = file.get_tensor(_TENSOR).float()
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot read the token frequencies {path}: {error}; "
            "`vllm-dlm count-tokens` writes such a file"
        ) from error
    in_range = (table > 0) & (table <= 1)  # not so for NaN
    if table.dim() != 1 or not len(table) or not in_range.all():
        raise ValueError(
            f"the token frequencies {path} are not one number per token id, each "
            "over 0 and at most 1; `vllm-dlm count-tokens` writes such a file"
        )
    return table


def find_frequencies(context: Context) -> torch.Tensor | None:
    """The model's own table, if there is one; see `places`."""
    for path in places(context):
        if path.is_file():
            try:
                return load_frequencies(path)
            except ValueError as error:
                # A damaged file must not end the engine that looks for one.
                logger.warning("%s; it is passed over", error)
    return None


def places(context: Context) -> Iterator[Path]:
    """Where a model's table is looked for, in this order.

    `pc/frequencies.safetensors` of the model folder (not beside the weights: vLLM
    loads every safetensors file there), then `frequencies.safetensors` in the folder
    of the model's key, where learned filters are kept too.
    """
    yield Path(context.model) / "pc" / "frequencies.safetensors"
    filter_dir = (context.options or {}).get("filter_dir")
    if filter_dir and context.model_key:
        yield Path(filter_dir) / context.model_key / "frequencies.safetensors"
