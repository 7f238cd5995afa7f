# SPDX-License-Identifier: Apache-2.0
"""The documentation is complete, its links lead somewhere, its commands exist."""

import argparse
import functools
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_dlm.cli.command import make_parser
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.steering.options import SteerConfig
from vllm_dlm.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
)
OURS = [name for name in STRATEGIES if STRATEGIES[name].__module__.startswith("vllm_")]


def text_of(page: Path) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.S)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    code = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", code, flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading).lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("name", OURS)
def test_a_strategy_has_a_page_with_its_parameters(name: str):
    page = ROOT / f"docs/strategies/{name}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {name}\n")
    assert text.count("<!-- decode -->\n") == 1
    for parameter in STRATEGIES[name].Params.model_fields:
        assert f"`{parameter}`" in text, parameter
    for preset in STRATEGIES[name].Params.presets:
        assert f"| `{preset}` |" in text, preset
    index = (ROOT / "docs/strategies.md").read_text(encoding="utf-8")
    assert f"[{name}](strategies/{name}.md)" in index


def test_serving_names_who_follows_the_step_schedule():
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^- \*\*`steps`\*\*.*?(?=^- )", text, flags=re.M | re.S)
    named = {name for name in OURS if f"`{name}`" in entry}
    assert named == {name for name in OURS if STRATEGIES[name].schedule}


# Commands --------------------------------------------------------------------------

COMMAND = re.compile(r"(vllm-dlm|vllm serve|python -m benchmarks)\b")
OF_OTHER_PACKAGES = ("lead",)  # the strategy that strategies.md adds as an example


def commands() -> list[tuple[str, str]]:
    """What the code blocks of all pages say to type: page, and one command."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text("utf-8"), re.S)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            line = re.sub(r"(\s+#.*|\s*&)$", "", line.strip()).removeprefix(
                ".venv/bin/"
            )
            words = shlex.split(line) if COMMAND.match(line) else []
            if words and not set(words) & set(OF_OTHER_PACKAGES):
                found.append((str(page.relative_to(ROOT)), line))
    return sorted(set(found))


@functools.cache
def serve_parser() -> argparse.ArgumentParser:
    """That of `vllm serve`."""
    serve = pytest.importorskip("vllm.entrypoints.cli.serve")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_dlm.plugin import register

    register()
    return serve.make_arg_parser(FlexibleArgumentParser())


class Parsed(Exception):
    """The arguments are right; do not go on."""


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_are_parsed(page: str, command: str, monkeypatch, tmp_path):
    """By the parser that a user's command meets; nothing is run."""
    program, *argv = shlex.split(command)
    monkeypatch.chdir(tmp_path)  # outputs are checked to be writable
    if program == "vllm-dlm":
        make_parser(argv).parse_args(argv)
    elif program == "vllm":
        serve_parser().parse_args(argv[1:])
    else:
        module = argv[1]
        monkeypatch.setattr(sys, "argv", [module, *argv[2:]])
        monkeypatch.syspath_prepend(str(ROOT))
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(self, args=None, namespace=None):
            parse(self, args, namespace)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_exist(page: Path):
    options = [*DlmConfig.model_fields, *SteerConfig.model_fields]
    flags = {f"--dlm-{name}".replace("_", "-") for name in options}
    flags |= {flag.replace("--dlm-", "--no-dlm-") for flag in flags}
    named = re.findall(r"--(?:no-)?dlm-[a-z][a-z-]*[a-z]", page.read_text("utf-8"))
    assert set(named) <= flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_are_python(page: Path):
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S):
        block = textwrap.dedent(block)
        compile(block, str(page), "exec", flags=0x2000)  # top-level await is allowed
