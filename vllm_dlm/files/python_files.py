# SPDX-License-Identifier: Apache-2.0
"""What a user's own file holds, where an option names it as FILE.py:NAME."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from vllm_dlm.messages import quote


def load_file(file: Path, option: str) -> ModuleType:
    """Run a Python file, as a module that no other module can import.

    Args:
        file: The file.
        option: What names it, for error messages ("--scorer").

    Raises:
        ValueError: there is none, it is no Python file, or it raises an error.
    """
    if not file.is_file():
        raise ValueError(f"{option}: there is no file {quote(str(file))}")
    name = f"_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(
            f"{option}: {quote(str(file))} is no Python file (FILE.py:NAME)"
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"{option}: {file} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return module


def callables_in(module: ModuleType) -> list[str]:
    """Names of what can be called and is a file's own, not imported there."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
