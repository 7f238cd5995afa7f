# SPDX-License-Identifier: Apache-2.0
"""numba's compiled code on disk, for servers that must go on without it.

A kernel is compiled in the midst of a step. numba's own cache raises there if the disk
is full or a file is damaged (a machine that lost power leaves empty ones), which would
end the engine. And it numbers a function's files: two processes that compile for
different types at the same time may take the same number, and then load each other's
code, which reads its arguments wrongly. Here a file's name says what it was compiled
from, and what cannot be read or written is compiled anew.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile

logger = logging.getLogger(f"vllm.{__name__}")


class _Files(IndexDataCacheFile):
    """Index and data of one function."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception as error:  # whatever unpickling a damaged file raises
            logger.warning(
                "numba's cache file %s cannot be read (%s: %s); it will be replaced",
                *(self._index_path, type(error).__name__, error),
            )
            return {}

    def save(self, key: Any, data: Any) -> None:
        """Write an entry: its data first, as others may look into the index.

        An entry that another process writes meanwhile may drop out of the index: then
        it is compiled once more.
        """
        parts = repr((key, self._source_stamp)).encode()
        name = self._data_name(int(hashlib.sha256(parts).hexdigest()[:16], 16))
        self._save_data(name, data)
        overloads = self._load_index()
        overloads[key] = name
        self._save_index(overloads)


class SafeCache(FunctionCache):
    """The cache of one function, which never raises once it is made.

    Raises:
        RuntimeError: neither the package nor the user's cache is writable.
    """

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._cache_file = _Files(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=self._impl.locator.get_source_stamp(),
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """What was compiled for a signature; None if there is nothing of use."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # as above
            self._tell("read", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep what was compiled, if that is possible."""
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self._tell("written", error)

    def _tell(self, done: str, error: Exception) -> None:
        logger.warning(
            "compiled code of %s in %s cannot be %s (%s: %s); going on without it",
            *(self._py_func.__name__, self._cache_path, done),
            *(type(error).__name__, error),
        )
