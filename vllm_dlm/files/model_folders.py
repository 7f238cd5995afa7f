# SPDX-License-Identifier: Apache-2.0
"""A model's folder, as our own loops read it: config.json and the weights.

What vLLM serves, vLLM reads. This is for training and for the plain loop of the
benchmark, which build their networks by hand: sizes are checked before anything is
built from them, and weights against the network that they are for.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, RootModel

from vllm_dlm.files.tensor_files import (
    Rule,
    check_tensors,
    read_dtypes,
    read_safetensors,
)
from vllm_dlm.files.whole_files import MIB, BadFile, path_part, read_json

WEIGHTS = "weights"
INDEX = "model.safetensors.index.json"
"""Where a folder says which file of weights has which tensor."""
_CONFIG = "configuration"
_INDEX = "index of weights"
_MOST_BYTES = 1 << 40
_MOST_INDEX_BYTES = 64 * MIB
_MOST_CONFIG_BYTES = 16 * MIB
_LARGEST_SIZE = 1 << 24
_MOST_LAYERS = 1024


class _Object(RootModel[dict[str, Any]]):
    """Any JSON object."""


class Config:
    """The config.json of a model's folder.

    Args:
        folder: the model's.

    Raises:
        BadFile: there is none, or it is no JSON object.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.path = Path(folder) / "config.json"
        self.values: dict[str, Any] = read_json(
            self.path, _CONFIG, _Object, _MOST_CONFIG_BYTES
        ).root

    def has(self, name: str) -> bool:
        """Whether a field is set, neither null nor 0."""
        return bool(self.values.get(name))

    def size(self, *names: str, most: int = _LARGEST_SIZE, least: int = 1) -> int:
        """A whole number: the first of these fields that is set.

        Raises:
            BadFile: none is, or it is no whole number from `least` to `most`.
        """
        name = next(filter(self.has, names), names[-1])
        value: Any = self.values.get(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not least <= value <= most:
            raise self._bad(name, f"a whole number from {least} to {most}")
        return int(value)

    def layers(self, name: str) -> int:
        """A number of layers; each is built before its weights are looked for."""
        return self.size(name, most=_MOST_LAYERS)

    def token_id(self, name: str) -> int:
        """A token id, as `size`, from 0."""
        return self.size(name, least=0)

    def number(self, name: str) -> float:
        """A number over 0.

        Raises:
            BadFile: it is none.
        """
        value: Any = self.values.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise self._bad(name, "a number over 0")
        return float(value)

    def _bad(self, name: str, expected: str) -> BadFile:
        value = self.values.get(name)
        return BadFile(
            _CONFIG, self.path, f"{name}: expected {expected}, got {value!r:.80}"
        )


def read_weights(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file of weights.

    Raises:
        BadFile: as `read_safetensors`.
    """
    return read_safetensors(path, WEIGHTS, _MOST_BYTES)[0]


def read_all_weights(folder: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of all files of weights in a folder.

    Raises:
        BadFile: as `read_weights`; or there is no such file.
    """
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        found |= read_weights(file)
    return found


class _Index(BaseModel):
    """The index of a folder whose weights are in several files."""

    weight_map: dict[str, str] = Field(min_length=1)


def weight_files(folder: str | PathLike[str]) -> list[Path]:
    """The files of weights of a folder: those of its index, or all.

    Raises:
        BadFile: there is none, the index is damaged, or names what is no file's name.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BadFile(WEIGHTS, folder, "the folder has no *.safetensors")
        return files
    places = read_json(index, _INDEX, _Index, _MOST_INDEX_BYTES).weight_map
    try:
        names = [path_part(name, "the file") for name in sorted({*places.values()})]
    except ValueError as error:
        raise BadFile(_INDEX, index, error) from None
    return [folder / name for name in names]


def stored_dtypes(folder: str | PathLike[str]) -> dict[str, torch.dtype]:
    """Name of each tensor in a folder's files of weights -> its type.

    Raises:
        BadFile: as `weight_files`; or a file is no safetensors.
    """
    return {
        name: dtype
        for file in weight_files(folder)
        for name, dtype in read_dtypes(file, WEIGHTS, _MOST_BYTES).items()
    }


def check_weights(
    tensors: Any,
    network: torch.nn.Module,
    path: str | PathLike[str],
    what: str = WEIGHTS,
) -> None:
    """Check that tensors are those of a network, of its shapes, and finite.

    Raises:
        BadFile: one is missing, or is not as the network needs it.
    """
    rules = {
        name: Rule(" ".join(map(str, tensor.shape)))
        for name, tensor in network.state_dict().items()
    }
    check_tensors(tensors, rules, path, what)


def check_room(
    parameters: int, tensors: dict[str, torch.Tensor], config: Config
) -> None:
    """Check that a network has no more parameters than there are, before it is built.

    Raises:
        BadFile: config.json speaks of a larger one.
    """
    found = sum(tensor.numel() for tensor in tensors.values())
    if parameters > found:
        raise BadFile(
            _CONFIG,
            config.path,
            f"its sizes are those of {parameters} parameters, and the weights beside "
            f"it have {found}",
        )
