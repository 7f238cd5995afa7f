# SPDX-License-Identifier: Apache-2.0
"""Types of command-line arguments: what is wrong shows before long work begins."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= 1")
    return int(text)


def output_file(text: str) -> Path:
    """A file that can be written; folders that are missing will be made."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no ordinary file")
    _check_writable(path.parent)
    return path


def output_folder(text: str) -> Path:
    """A folder that can be written into, or made."""
    path = Path(text)
    _check_writable(path)
    return path


def _check_writable(folder: Path) -> None:
    known = (folder, *folder.absolute().parents)
    there = next(part for part in known if part.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write to {str(there)!r}")
