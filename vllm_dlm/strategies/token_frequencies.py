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

from vllm_dlm.files.tensor_files import (
    FLOATS,
    Rule,
    check_tensors,
    read_safetensors,
    write_safetensors,
)
from vllm_dlm.files.whole_files import MIB, BadFile, remembered
from vllm_dlm.strategies.base import Context

logger = logging.getLogger(__name__)

_TENSOR = "frequencies"
_WHAT = "token frequencies"
_RULES = {_TENSOR: Rule("V", FLOATS, least=0, most=1)}
_MOST_BYTES = 256 * MIB
_HINT = "`vllm-dlm count-tokens` writes such a file"


def save_frequencies(
    path: str | Path, frequencies: torch.Tensor, facts: Mapping[str, str]
) -> None:
    """Write a table [V] and what is known of it, as metadata.

    A reader sees the old one or the new one, never half.
    """
    write_safetensors(path, {_TENSOR: frequencies.float()}, facts)


def _read(path: Path) -> torch.Tensor:
    tensors, _ = read_safetensors(path, _WHAT, _MOST_BYTES)
    check_tensors(tensors, _RULES, path, _WHAT)
    table: torch.Tensor = tensors[_TENSOR].float()
    if not (table > 0).all():
        reason = f"{_TENSOR}: it holds 0; expected a share over 0 of every token id"
        raise BadFile(_WHAT, path, reason)
    return table


_look = remembered(_read)


def load_frequencies(path: str | Path) -> torch.Tensor:
    """Read a table, [V] float32, onto the CPU; again only when it has changed.

    Raises:
        ValueError: there is no such file, or it holds no such table.
    """
    try:
        return _look(path)
    except BadFile as error:
        raise ValueError(f"{error}; {_HINT}") from None


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
