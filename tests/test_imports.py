# SPDX-License-Identifier: Apache-2.0
"""Imports go down the house, never up, and never in a circle.

All import statements count: those for type checkers, and those inside functions too.
What a lower floor needs of a higher one it names as a string in a table (`Registry`),
which is looked up when somebody asks for it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GROUND = (
    *("files", "messages", "metrics", "option_bounds", "option_types", "ray_cluster"),
    *("registry", "trajectories", "vllm_objects"),
)
"""They may import one another; on the floors above, each part is alone."""

FLOORS = (
    GROUND,
    ("kernels", "strategies", "tasks"),
    ("constraints",),
    ("config",),
    ("admission",),
    ("entrypoints", "model_executor"),
    ("patches",),
    ("platform", "plugin"),
    ("cli",),
    # The wings. Two are above the rest: training makes what they use, and an
    # evaluation reports as the benchmark does.
    (
        *("bench", "layer_skip", "learn2pd", "search", "spec_decode", "steering"),
        *("switching",),
        *("testing", "watching"),
    ),
    ("evaluation", "training"),
    # The package's own __init__.py: the public names.
    ("vllm_dlm",),
)
"""A part of the package imports itself and the floors below."""

FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def module_files() -> dict[str, Path]:
    """Name of each module of the package -> its file."""
    files = {}
    for file in sorted((ROOT / "vllm_dlm").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


FILES = module_files()


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a module imports, wherever it does."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name their module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            # The package itself is imported before any module of it.
            if name.startswith("vllm_dlm.") and name != "vllm_dlm.__version__":
                # What is imported from a module is no module itself.
                yield name if name in FILES else name.rpartition(".")[0]


TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}

GRAPH = {module: {*imports_of(tree)} - {module} for module, tree in TREES.items()}


def part_of(module: str) -> str:
    """The part of the package in which a module lies."""
    return ".".join(module.split(".")[1:2]) or module


def test_each_part_has_a_floor():
    assert {part_of(module) for module in FILES} == FLOOR_OF.keys()


def test_no_import_goes_up():
    upwards = []
    for module, imported in GRAPH.items():
        part = part_of(module)
        lower = {name for name, floor in FLOOR_OF.items() if floor < FLOOR_OF[part]}
        allowed = {part, *lower, *(GROUND if part in GROUND else ())}
        upwards += [
            f"{module} -> {name}" for name in imported if part_of(name) not in allowed
        ]
    assert sorted(upwards) == []


def test_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        # It is told from what is imported to who imports it.
        pytest.fail(" -> ".join(error.args[1][::-1]))


def test_what_a_table_names_exists():
    """Strings "module:name", by which a lower floor finds a higher one."""
    lost, pattern = [], re.compile(r"(vllm_dlm(?:\.\w+)+):(\w+)")
    for user, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = pattern.fullmatch(node.value)
                if found and found[2] not in defined_in(TREES.get(found[1])):
                    lost.append(f"{user}: {node.value}")
    assert lost == []


def defined_in(tree: ast.Module | None) -> set[str]:
    """Names that a module defines."""
    names: set[str] = set()
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {one.id for one in targets if isinstance(one, ast.Name)}
    return names


def test_what_counts_as_an_import():
    text = """
if TYPE_CHECKING:
    from vllm_dlm.config.options import DlmConfig
def lazy():
    import vllm_dlm.plugin
    from vllm_dlm import messages, LLM, __version__
    import_module("vllm_dlm.bench.command")
"""
    assert {*imports_of(ast.parse(text))} == {
        "vllm_dlm.config.options",
        "vllm_dlm.plugin",
        "vllm_dlm.messages",
        "vllm_dlm",
    }
