# SPDX-License-Identifier: Apache-2.0
"""Automata that one process has compiled, in files for others of the same machine.

Compiling takes up to seconds, and reading a file some milliseconds. The process that
admits requests compiles, beside its work; scheduler and worker, whose steps would stand
still meanwhile, look here first. Where there is no file (another machine, or one that
is gone) they compile. A file's name says all that its automaton is made of.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from pathlib import Path
from threading import Lock
from zipfile import BadZipFile

import numpy as np

from vllm_dlm.constraints.automaton import Automaton
from vllm_dlm.constraints.thoughts import ThoughtEnd
from vllm_dlm.files.whole_files import MIB, BadFile, open_file, replacing

MOST_BYTES = 256 * MIB
"""Of all files; and of a single one."""

ARRAYS = ("class_of", "transitions", "accepting", "min_length", "max_length")
NUMBERS = ("end_state", "end_class", "start")


def file_name(
    pattern: str,
    thought: ThoughtEnd | None,
    tokenizer: Hashable,
    end_ids: Sequence[int],
    barred: Sequence[int],
) -> str:
    """The name of an automaton's file.

    Args:
        pattern: regular expression.
        thought: what ends a thought in front of it.
        tokenizer: which vocabulary; see `Job.tokenizer`.
        end_ids, barred: as in `compile_pattern`, rising.
    """
    end = None if thought is None else tuple(thought)
    parts = repr((pattern, end, tokenizer, tuple(end_ids), tuple(barred)))
    return f"{hashlib.sha256(parts.encode('utf-8', 'surrogatepass')).hexdigest()}.npz"


def read(folder: str, name: str) -> Automaton | None:
    """The automaton of a file; None if there is no such file that can be used."""
    try:
        with open_file(Path(folder, name), "automaton", MOST_BYTES) as file:
            content = io.BytesIO(file.read(MOST_BYTES))
        with np.load(content, allow_pickle=False) as found:
            arrays = {key: found[key] for key in ARRAYS}
            numbers = dict(zip(NUMBERS, found["numbers"].tolist(), strict=True))
    except (BadFile, BadZipFile, OSError, ValueError, KeyError):
        return None
    for array in arrays.values():
        array.flags.writeable = False
    return Automaton(**arrays, **numbers)


class Shelf:
    """The files of one process, in a folder for its user alone that ends with it.

    Args:
        most_bytes: of all files; the oldest ones go.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._folder: str | None = None
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = Lock()

    @property
    def folder(self) -> str | None:
        """Where the files are; None before there is one."""
        return self._folder

    def put(self, name: str, automaton: Automaton) -> None:
        """Write an automaton's file, if there is room for one."""
        content = io.BytesIO()
        arrays = {key: getattr(automaton, key) for key in ARRAYS}
        numbers = np.array([getattr(automaton, key) for key in NUMBERS])
        np.savez(content, numbers=numbers, **arrays)
        with self._lock:
            try:
                self._write(name, content.getvalue())
            except OSError:
                # Whoever needs the automaton compiles it.
                return

    def _write(self, name: str, content: bytes) -> None:
        if self._folder is None:
            self._folder = tempfile.mkdtemp(prefix="vllm-dlm-patterns-")
            atexit.register(shutil.rmtree, self._folder, ignore_errors=True)
        if name in self._sizes:
            self._sizes.move_to_end(name)
            return
        with replacing(Path(self._folder, name), private=True) as part:
            part.write_bytes(content)
        self._sizes[name] = len(content)
        while len(self._sizes) > 1 and sum(self._sizes.values()) > self._most_bytes:
            oldest, _ = self._sizes.popitem(last=False)
            Path(self._folder, oldest).unlink(missing_ok=True)
