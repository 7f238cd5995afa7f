# SPDX-License-Identifier: Apache-2.0
"""The documentation is complete, its links lead somewhere, its commands exist."""

import argparse
import json
import re
import runpy
import sys
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from documented import PAGES, ROOT, commands, vllm_parser
from packaging.requirements import Requirement

from vllm_dlm.cli.command import make_parser
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.steering.options import SteerConfig
from vllm_dlm.strategies import STRATEGIES

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


def test_the_readme_counts_them():
    """Where it introduces them, and where it compares servers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    counted = re.findall(r"any of (\d+)\ndecoding|\| (\d+), and yours", text)
    assert [int(a or b) for a, b in counted] == [len(OURS)] * 2


def test_serving_names_who_follows_the_step_schedule():
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^- \*\*`steps`\*\*.*?(?=^- )", text, flags=re.M | re.S)
    named = {name for name in OURS if f"`{name}`" in entry}
    assert named == {name for name in OURS if STRATEGIES[name].schedule}


# Commands --------------------------------------------------------------------------

OF_OTHER_PACKAGES = ("lead",)  # the strategy that strategies.md adds as an example


class Parsed(Exception):
    """The arguments are right; do not go on."""


def parse_ours(words, monkeypatch):
    argv = list(words[1:])
    if "--help" in argv:
        with pytest.raises(SystemExit, match="^0$"):
            make_parser(argv).parse_args(argv)
    else:
        make_parser(argv).parse_args(argv)


def parse_vllm(words, monkeypatch):
    if not set(words) & set(OF_OTHER_PACKAGES):
        vllm_parser().parse_args(words[1:])


def parse_python(words, monkeypatch):
    """A module of ours, up to its parsed arguments, or a file that exists."""
    if words[1] != "-m":
        assert (ROOT / words[1]).is_file()
        return
    module = words[2]
    monkeypatch.setattr(sys, "argv", [module, *words[3:]])
    monkeypatch.syspath_prepend(str(ROOT))
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def parse_make(words, monkeypatch):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (phony,) = re.findall(r"^\.PHONY:((?:.*\\\n)*.*)$", makefile, flags=re.M)
    targets = [word for word in words[1:] if "=" not in word]
    assert set(targets) <= set(phony.split())


def parse_pip(words, monkeypatch):
    """Extras of ours, and files and folders, exist."""
    assert words[1] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        if word.startswith("vllm-dlm"):
            assert Requirement(word).extras <= project["optional-dependencies"].keys()
        elif not word.startswith("-"):
            assert (ROOT / word).exists(), word


def parse_curl(words, monkeypatch):
    """Bodies are JSON. tests/server/test_documented.py sends them, where it can."""
    body = next((b for flag, b in pairwise(words) if flag == "-d"), "{}")
    if body != "$2":
        json.loads(body)


def parse_post(words, monkeypatch):
    json.loads(words[2])


def parse_kubectl(words, monkeypatch):
    """Files exist."""
    for flag, value in pairwise(words):
        assert flag != "-f" or (ROOT / value).is_file(), value


def parse_docker(words, monkeypatch):
    """The same; what stands behind an image of ours are a server's arguments."""
    parse_kubectl(words, monkeypatch)
    images = [index for index, word in enumerate(words) if word.startswith("vllm-dlm:")]
    if words[1] == "run":
        vllm_parser().parse_args(["serve", *words[images[0] + 1 :]])


PROGRAMS = {
    "vllm-dlm": parse_ours,
    "vllm": parse_vllm,
    "python": parse_python,
    "make": parse_make,
    "pip": parse_pip,
    "curl": parse_curl,
    "post": parse_post,  # training.md's, which makes it of curl
    "post()": lambda *_: None,
    "docker": parse_docker,
    "kubectl": parse_kubectl,
}
"""How the arguments of each program on a page are checked."""


@pytest.mark.parametrize(
    ("page", "words"),
    commands(),
    ids=lambda value: "-".join(value)[:60] if isinstance(value, tuple) else value,
)
def test_commands_are_parsed(page: str, words: tuple[str, ...], monkeypatch, tmp_path):
    """By the parser that a user's command meets, where it is ours; nothing is run."""
    monkeypatch.chdir(tmp_path)  # outputs are checked to be writable
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    assert words[0] in PROGRAMS, "say in PROGRAMS how its arguments are checked"
    PROGRAMS[words[0]](words, monkeypatch)


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
