# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: safetensors, and what `torch.save` writes.

A reader says what each tensor must be (`Rule`): its kind of numbers, its shape, the
range of its values, which are finite in any case. What is read is checked against that
before anything is computed with it.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from vllm_dlm.files.whole_files import MIB, BadFile, open_file, replacing

if TYPE_CHECKING:
    import numpy as np

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

HEADER_BYTES = 8 * MIB
"""Most of a safetensors header, which names the tensors."""


@dataclass(frozen=True)
class Rule:
    """What a tensor of a file must be."""

    shape: str
    """One letter or number per dimension, as in "2 H"; the same letter is the same
    size."""
    dtypes: tuple[torch.dtype, ...] = FLOATS
    least: float | None = None
    most: float | None = None
    may_be_empty: bool = False


def read_safetensors(
    path: str | PathLike[str], what: str, most_bytes: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, onto the CPU, and its metadata.

    They are copies: a file that changes later does not change them.

    Raises:
        BadFile: as `open_file`, or it is no such file.
    """
    with _opened(path, what, most_bytes) as tensors:
        metadata = dict(tensors.metadata() or {})
        found = {
            name: tensors.get_tensor(name).clone() for name in sorted(tensors.keys())
        }
    return found, metadata


def read_dtypes(
    path: str | PathLike[str], what: str, most_bytes: int
) -> dict[str, torch.dtype]:
    """Types of the tensors of a safetensors file, without reading them.

    Raises:
        BadFile: as `read_safetensors`.
    """
    with _opened(path, what, most_bytes) as tensors:
        # A slice of nothing has the type of the tensor.
        return {
            name: tensors.get_slice(name)[..., :0].dtype
            for name in sorted(tensors.keys())
        }


@contextmanager
def _opened(path: str | PathLike[str], what: str, most_bytes: int) -> Iterator[Any]:
    """A safetensors file; any error while it is read is a `BadFile`."""
    from safetensors import safe_open

    with open_file(path, what, most_bytes) as file:
        begin = file.read(8)
    if len(begin) < 8:
        raise BadFile(what, path, "it is empty or cut short; expected safetensors")
    if struct.unpack("<Q", begin)[0] > HEADER_BYTES:
        reason = f"it is not safetensors, or has a header of over {HEADER_BYTES} bytes"
        raise BadFile(what, path, reason)
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except Exception as error:  # of Rust and of torch: there is no list of them
        raise BadFile(what, path, error) from None


def write_safetensors(
    path: str | PathLike[str],
    tensors: Mapping[str, torch.Tensor | np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file whole, as `replacing` does."""
    from safetensors.torch import save_file

    found = {
        name: torch.as_tensor(tensor).detach().contiguous()
        for name, tensor in tensors.items()
    }
    with replacing(path) as part:
        save_file(found, part, metadata=dict(metadata or {}))


def read_checkpoint(path: str | PathLike[str], what: str, most_bytes: int) -> Any:
    """What `torch.save` wrote: tensors and plain values, no code.

    Raises:
        BadFile: as `open_file`, or it is no such file, or grows beyond `most_bytes`
            where it is unpacked.
    """
    with open_file(path, what, most_bytes) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(part.file_size for part in archive.infolist())
            if unpacked > most_bytes:
                raise ValueError(f"it unpacks to {unpacked} bytes: over {most_bytes}")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever its parts raise
            reason = f"expected a checkpoint of torch.save ({error})"
            raise BadFile(what, path, reason) from None


def write_checkpoint(path: str | PathLike[str], state: Any) -> None:
    """Write what `read_checkpoint` reads, whole, as `replacing` does."""
    with replacing(path) as part:
        torch.save(state, part)


def check_tensors(
    tensors: Any, rules: Mapping[str, Rule], path: str | PathLike[str], what: str
) -> dict[str, int]:
    """Check tensors that were read from a file.

    Args:
        tensors: name -> tensor; further ones do not matter.
        rules: what those that are needed must be.

    Returns:
        The size of each letter of the rules.

    Raises:
        BadFile: a tensor is missing, or is not as its rule says.
    """
    if not isinstance(tensors, Mapping):
        kind = type(tensors).__name__
        raise BadFile(what, path, f"expected tensors by name, got {kind}")
    sizes: dict[str, int] = {}
    givers: dict[str, str] = {}
    for name, rule in rules.items():
        tensor = tensors.get(name)
        try:
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"expected a tensor, got {type(tensor).__name__}")
            _check_layout(tensor, rule)
            for letter, size in zip(rule.shape.split(), tensor.shape, strict=True):
                giver = givers.setdefault(letter, name)
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(
                        f"its shape is {list(tensor.shape)}; expected {_named(rule)} "
                        f"with {letter} = {sizes[letter]}, as {giver} has it"
                    )
            _check_values(tensor, rule)
        except ValueError as error:
            found = ", ".join(map(str, sorted(map(str, tensors))[:8])) or "none"
            reason = f"{name}: {error}"
            if name not in tensors:
                reason = f"it has no tensor {name!r}; its tensors: {found}"
            raise BadFile(what, path, reason) from None
    return sizes


def _named(rule: Rule) -> str:
    return f"[{', '.join(rule.shape.split())}]"


def _check_layout(tensor: torch.Tensor, rule: Rule) -> None:
    if tensor.dtype not in rule.dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in rule.dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"it is of the type {found}; expected {expected}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError("expected an ordinary tensor, neither sparse nor without data")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError("it declares more entries than it has")
    letters = rule.shape.split()
    shape = tuple(tensor.shape)
    if len(shape) != len(letters) or any(
        letter.isdigit() and size != int(letter)
        for letter, size in zip(letters, shape, strict=False)
    ):
        raise ValueError(f"its shape is {list(shape)}; expected {_named(rule)}")
    if 0 in shape and not rule.may_be_empty:
        raise ValueError(f"its shape is {list(shape)}: nothing is in it")


def _check_values(tensor: torch.Tensor, rule: Rule) -> None:
    if tensor.numel() == 0:
        return
    least, most = (float(bound) for bound in tensor.aminmax())
    # Both are NaN where one value is.
    if not float("-inf") < least <= most < float("inf"):
        raise ValueError("it holds NaN or infinite values")
    if rule.least is not None and least < rule.least:
        raise ValueError(f"it holds {least:g}; expected at least {rule.least:g}")
    if rule.most is not None and most > rule.most:
        raise ValueError(f"it holds {most:g}; expected at most {rule.most:g}")


def number_of(
    metadata: Mapping[str, str],
    name: str,
    default: float,
    path: str | PathLike[str],
    what: str,
) -> float:
    """A number that the metadata of a safetensors file holds as text.

    Raises:
        BadFile: it is none.
    """
    text = metadata.get(name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError:
        raise BadFile(
            what, path, f"{name}: expected a number, got {text[:80]!r}"
        ) from None
