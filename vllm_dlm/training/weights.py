# SPDX-License-Identifier: Apache-2.0
"""Trained weights as a folder like the one they come from, in shards if they are big.

Configuration and tokenizer are copied; each tensor has the name and the type that it
had. One shard is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dlm.files.model_folders import INDEX, Config, stored_dtypes
from vllm_dlm.files.tensor_files import write_safetensors
from vllm_dlm.files.whole_files import open_file, replacing, write_json

SHARD_BYTES = 4 << 30
"""Most bytes of a file of weights, unless one tensor has more."""

_COPIED = (".json", ".jinja", ".model", ".txt", ".py")


def write_like(
    tensors: Iterable[tuple[str, Tensor]],
    sizes: Mapping[str, int],
    source: str | Path,
    output_dir: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write new weights of a model; all else as in the folder it was loaded from.

    Args:
        tensors: Each tensor and its name, in the order of `sizes`.
        sizes: Name of each tensor -> its number of elements.
        source: The folder that the model was loaded from, in whose types they are
            written; float32 for tensors that it does not have.
        output_dir: The folder to write.
        config: Entries that replace or join those of config.json.
        shard_bytes: Most bytes of a file; `SHARD_BYTES` by default.
    """
    source, output_dir = Path(source), Path(output_dir)
    copy_texts(source, output_dir)
    if config:
        old = Config(output_dir)
        write_json(old.path, old.values | dict(config))
    dtypes = stored_dtypes(source)
    types = {name: dtypes.get(name, torch.float32) for name in sizes}
    shards = plan_shards(
        {name: sizes[name] * types[name].itemsize for name in sizes},
        shard_bytes or SHARD_BYTES,
    )
    files = [
        "model.safetensors"
        if len(shards) == 1
        else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    found = iter(tensors)
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for name in names:
            given, tensor = next(found)
            if given != name:
                raise ValueError(f"expected the tensor {name!r}, got {given!r}")
            shard[name] = tensor.detach().to("cpu", types[name])
        write_safetensors(output_dir / file, shard, {"format": "pt"})
    # Of an earlier training whose weights were in other files.
    for old_file in output_dir.glob("model*.safetensors"):
        if old_file.name not in files:
            old_file.unlink()
    index = output_dir / INDEX
    if len(files) == 1:
        index.unlink(missing_ok=True)
        return
    total = sum(sizes[name] * types[name].itemsize for name in sizes)
    places = {
        name: file for file, names in zip(files, shards, strict=True) for name in names
    }
    write_json(index, {"metadata": {"total_size": total}, "weight_map": places})


def plan_shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names of tensors, in files of at most so many bytes, in their order.

    Args:
        sizes: Name -> bytes.
        most: Of a file; a larger tensor has a file of its own.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def copy_texts(source: Path, output_dir: Path) -> None:
    """Copy configuration, tokenizer and code of a model; not its weights or card."""
    for file in source.iterdir():
        # The weights may be in other files here: they get an index of their own.
        is_text = file.suffix in _COPIED and not file.name.endswith(".index.json")
        if is_text and file.resolve() != (output_dir / file.name).resolve():
            with (
                open_file(file, "model's file") as content,
                replacing(output_dir / file.name) as part,
                part.open("wb") as copy,
            ):
                shutil.copyfileobj(content, copy)


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> number of elements, as `write_like` takes it."""
    return {name: tensor.numel() for name, tensor in tensors.items()}
