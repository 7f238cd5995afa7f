# SPDX-License-Identifier: Apache-2.0
"""The commands that pages tell their readers to type, and the parsers they meet."""

from __future__ import annotations

import argparse
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)

OURS = re.compile(r"(\.venv/bin/)?((vllm-dlm|vllm) \S|python -m benchmarks\b)")
"""Commands in a block of no language, which may as well be a picture."""

_BEFORE = re.compile(r"^((\w+=\S+|taskset -c \S+)\s+)+")
"""What may stand before a program's name."""


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """Page and words of every command in a block of code, in the pages' order."""
    found = {}
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        blocks = re.findall(r"```(\w*)\n(.*?)```", page.read_text("utf-8"), re.S)
        for language, block in blocks:
            if language in ("", "bash", "sh"):
                for words in _commands_in(block, only_ours=language == ""):
                    found[name, words] = None
    return list(found)


def _commands_in(block: str, only_ours: bool) -> list[tuple[str, ...]]:
    found = []
    lines = iter(block.replace("\\\n", " ").splitlines())
    for line in lines:
        text = _BEFORE.sub("", line.strip(), count=1) if line.strip() else ""
        if only_ours and not OURS.match(text):
            continue
        while True:
            try:
                words = shlex.split(text.removeprefix(".venv/bin/"), comments=True)
                break
            except ValueError:  # a quotation goes on in the next line
                text += "\n" + next(lines)
        if words:
            found.append(tuple(word for word in words if word != "&"))
    return found


@functools.cache
def vllm_parser() -> argparse.ArgumentParser:
    """That of the command `vllm`, with this package's flags."""
    serve = pytest.importorskip("vllm.entrypoints.cli.serve")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_dlm.plugin import register

    register()
    for benchmark in ("latency", "serve", "throughput"):
        importlib.import_module(f"vllm.entrypoints.cli.benchmark.{benchmark}")
    parser = FlexibleArgumentParser()
    subcommands = parser.add_subparsers(required=True, dest="subcommand")
    for name in ("benchmark.main", "run_batch"):
        module = importlib.import_module(f"vllm.entrypoints.cli.{name}")
        # vLLM looks there whether it is `vllm bench`, and else gives it no types.
        with mock.patch.object(sys, "argv", ["vllm", "bench"]):
            for command in module.cmd_init():
                command.subparser_init(subcommands)
    for command in serve.cmd_init():
        command.subparser_init(subcommands)
    return parser
