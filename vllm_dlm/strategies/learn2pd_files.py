# SPDX-License-Identifier: Apache-2.0
"""Which filter Learn2PD decides by: the one that is named, or that fits."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from vllm_dlm.files.whole_files import path_part
from vllm_dlm.strategies.base import Context
from vllm_dlm.strategies.learn2pd_filter import Filter, load_filter

logger = logging.getLogger(__name__)

_MOST_LISTED = 20
"""Files named in a message."""


def named_filter(path: str, context: Context, block_length: int) -> Filter:
    """The filter of a file.

    Raises:
        ValueError: it is no filter, or for blocks of another length; the message lists
            what there is.
    """
    try:
        filter = load_filter(path)
    except ValueError as error:
        raise ValueError(f"{error}; available: {listing(context)}") from error
    if filter.block_length != block_length:
        raise ValueError(
            f"the filter {path} is for block length {filter.block_length}, not "
            f"{block_length}; available: {listing(context)}"
        )
    return filter


def listing(context: Context) -> str:
    """The files that exist for the model, in words."""
    return ", ".join(describe(path) for path in available(context)) or "none"


def describe(path: str | Path) -> str:
    """One filter file in words: name, block length, cache policy."""
    try:
        filter = load_filter(path)
    except ValueError:
        return f"{path} (cannot be read)"
    return f"{path} (block length {filter.block_length}, cache {filter.cache or 'any'})"


def available(context: Context) -> list[Path]:
    """Filter files that exist for the model, of any block length and cache policy.

    The first ones only, where there are very many.
    """
    model, filed = Path(context.model), _filed_under(context)
    found: list[Path] = []
    if model.is_dir():
        found += islice(model.glob("learn2pd/b*.safetensors"), _MOST_LISTED)
    if filed is not None and filed.is_dir():
        found += islice(filed.glob("b*.safetensors"), _MOST_LISTED)
    return sorted(found)[:_MOST_LISTED]


def find_filter(context: Context, block_length: int) -> Filter | None:
    """The filter trained for this model, block length and cache policy, if any.

    Looked for as `b{B}-{cache}.safetensors`, in this order: in the folder `learn2pd`
    of the model folder (not beside the weights: vLLM loads every safetensors file
    there), then in `{model_key}` of the option `filter_dir`. Warns if it was trained
    under another cache policy or on another model.
    """
    for path in _places(context, block_length):
        if path.is_file():
            try:
                filter = load_filter(path)
            except ValueError as error:
                # A damaged file must not end the engine that looks for one.
                logger.warning("%s; it is passed over", error)
                continue
            if filter.block_length == block_length:
                warn_if_foreign(filter, context, path)
                return filter
    return None


def filter_path(folder: Path, filter: Filter) -> Path:
    """Where `find_filter` looks for a learned filter.

    Args:
        folder: the option `filter_dir`.

    Raises:
        ValueError: the filter does not say the model or the cache policy that it is
            for, or says what would lead elsewhere.
    """
    key = path_part(filter.model_key, "model_key")
    cache = path_part(filter.cache, "cache")
    return folder / key / _file_name(filter.block_length, cache)


_learned: Counter[Path] = Counter()
"""Files that this process has learned, and how often."""


def note_learned(path: Path) -> None:
    """Tell this process's engines that it has written a filter that they may use."""
    _learned[path] += 1


def times_learned(context: Context, block_length: int) -> int:
    """How often this process has learned a filter that `find_filter` may find."""
    return sum(_learned[path] for path in _places(context, block_length))


def warn_if_foreign(filter: Filter, context: Context, path: str | Path) -> None:
    """Log that a filter was trained on another model or under another cache policy."""
    if filter.cache and filter.cache != context.cache:
        logger.warning(
            "the filter %s was trained under the cache policy %r, but %r is served: "
            "confidences differ, so expect lower quality",
            path,
            filter.cache,
            context.cache,
        )
    if filter.model_key and context.model_key not in ("", filter.model_key):
        logger.warning(
            "the filter %s was trained on the model %s, but %s is served",
            path,
            filter.model_key,
            context.model_key,
        )


def _filed_under(context: Context) -> Path | None:
    filter_dir = (context.options or {}).get("filter_dir")
    if not filter_dir or not context.model_key:
        return None
    return Path(filter_dir) / context.model_key


def _places(context: Context, block_length: int) -> Iterator[Path]:
    model, filed = Path(context.model), _filed_under(context)
    name = _file_name(block_length, context.cache)
    yield model / "learn2pd" / name
    if filed is not None:
        yield filed / name


def _file_name(block_length: int, cache: str) -> str:
    return f"b{block_length}-{cache}.safetensors"
