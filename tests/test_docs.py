# SPDX-License-Identifier: Apache-2.0
"""The documentation is complete, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

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
    index = (ROOT / "docs/strategies.md").read_text(encoding="utf-8")
    assert f"[{name}](strategies/{name}.md)" in index


def test_serving_names_who_follows_the_step_schedule():
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^- \*\*`steps`\*\*.*?(?=^- )", text, flags=re.M | re.S)
    named = {name for name in OURS if f"`{name}`" in entry}
    assert named == {name for name in OURS if STRATEGIES[name].schedule}
