# SPDX-License-Identifier: Apache-2.0
"""The page of `vllm-dlm watch`, in a real browser, and `vllm-dlm chat`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server.browser import Page, browser
from server.launch import Server
from server.test_frames import QUESTION, body_of

from vllm_dlm.cli.command import main
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.watching.page_server import PageServer

A, B = "#panes > section:nth-child(1)", "#panes > section:nth-child(2)"


@pytest.fixture(scope="module")
def address(server: Server) -> Iterator[str]:
    with PageServer(server.url, None) as pages:
        thread = threading.Thread(target=pages.serve_forever)
        thread.start()
        yield pages.address
        pages.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(tab: Page, address: str) -> Iterator[Page]:
    """The page, newly opened."""
    tab.open(address)
    tab.set("#prompt", QUESTION)
    tab.set("#max_tokens", "40")
    yield tab
    assert tab.errors == []


def run(page: Page) -> None:
    page.evaluate("document.querySelector('#run').click()")
    page.until(
        "/^(Finished|Stopped)/.test(document.querySelector('#status').textContent)"
    )


def forwards(page: Page, pane: str) -> int:
    return int(page.text(f"{pane} .forwards"))


def test_two_strategies_side_by_side(page: Page, server: Server):
    names = page.evaluate(
        f"[...document.querySelectorAll('{A} .strategy option')].map((o) => o.value)"
    )
    assert names == ["", *STRATEGIES]
    page.set("#compare", "on")
    page.set(f"{A} .strategy", "static")
    page.set(f"{B} .strategy", "threshold")
    page.set("#B-parameter-threshold", "0.8")
    run(page)
    for pane, options in (
        (A, {"dlm_strategy": "static"}),
        (B, {"dlm_strategy": "threshold", "dlm_threshold": 0.8}),
    ):
        answer = server.chat(QUESTION, max_tokens=40, vllm_xargs=options)
        wanted = answer.choices[0].message.content
        assert page.text(f"{pane} .answer") == wanted
        canvas = page.text(f"{pane} .canvas")
        assert canvas.startswith(wanted)
        assert "\N{MEDIUM SHADE}" not in canvas[: len(wanted)]
        assert float(page.text(f"{pane} .seconds")) > 0
    assert forwards(page, A) > forwards(page, B) >= 1
    assert page.text("#status").startswith("Finished. A: ")


def test_keys(page: Page, server: Server):
    """Ctrl+Enter asks; arrow keys go through the tokens, and what they say is read."""
    page.evaluate("document.querySelector('#prompt').focus()")
    page.press("Enter", modifiers=2)
    page.until("document.querySelector('#status').textContent.startsWith('Finished')")
    page.evaluate(f"document.querySelector('{A} .canvas').focus()")
    for key in ("Home", "ArrowRight"):
        page.press(key)
    first = page.evaluate(
        f"document.querySelector('{A} .canvas').children[1].textContent"
    )
    detail = page.text(f"{A} .detail")
    assert detail.startswith(f"Position 1: {json.dumps(first)}, step ")
    assert "confidence" in detail


def test_holes(page: Page):
    page.set("#template", "[Carl, {{8}}]")
    run(page)
    canvas = page.text(f"{A} .canvas")
    assert canvas.startswith("[Carl, ")
    assert canvas.endswith("]")
    assert page.text(f"{A} .answer").startswith("[Carl, ")
    assert forwards(page, A) >= 1
    page.set("#template", "")


def test_everything_has_a_name(page: Page):
    """Whatever can be reached by keys, for who does not see it."""
    page.set("#compare", "on")
    page.set(f"{A} .strategy", "dream")
    page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and any(p["name"] == "focusable" for p in node.get("properties", []))
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    assert len(nodes) > 50


CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data]
      .map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const box = document.querySelector(".canvas");
  const found = [];
  for (const kind of ["step", "confidence"]) for (const at of [0, 0.25, 0.5, 0.75, 1]) {
    const span = document.createElement("span");
    span.className = `t ${kind}`;
    span.style.setProperty("--at", at);
    box.append(span);
    const style = getComputedStyle(span);
    found.push(ratio(style.color, style.backgroundColor));
    span.remove();
  }
  const quiet = getComputedStyle(document.querySelector(".summary"));
  const panel = getComputedStyle(document.querySelector(".panel"));
  found.push(ratio(quiet.color, panel.backgroundColor));
  return found;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page: Page, scheme: str):
    """The contrast that WCAG 2 asks of text, on every colour."""
    page.scheme(scheme)
    ratios = page.evaluate(CONTRAST)
    assert len(ratios) == 11
    assert min(ratios) >= 4.5


def test_a_refusal_is_shown(page: Page):
    page.set("#max_tokens", "100000")
    run(page)
    assert "max_model_len" in page.text(f"{A} .error")
    # The browser's console names what was refused, too.
    assert all("400" in error for error in page.errors)
    page.errors.clear()


def test_replays(page: Page, server: Server, tmp_path: Path):
    """A saved stream gives the same picture again; a step map does."""
    page.set(f"{A} .strategy", "static")
    run(page)
    canvas, steps = page.text(f"{A} .canvas"), forwards(page, A)
    body = body_of(
        server,
        "/v1/chat/completions",
        vllm_xargs={"dlm_frames": "writes", "dlm_strategy": "static"},
    )
    saved = tmp_path / "canvas.sse"
    saved.write_text(
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text
    )
    page.give_file(f"{A} .open", saved)
    page.until(f"!document.querySelector('{A} .slider').disabled")
    assert (page.text(f"{A} .canvas"), forwards(page, A)) == (canvas, steps)
    page.evaluate(
        f"""(() => {{
          const slider = document.querySelector('{A} .slider');
          slider.value = 1;
          slider.dispatchEvent(new Event("input"));
        }})()"""
    )
    assert "\N{MEDIUM SHADE}" in page.text(f"{A} .canvas")
    answer = server.chat(
        QUESTION,
        max_tokens=40,
        logprobs=True,
        vllm_xargs={"dlm_step_map": True, "dlm_strategy": "static"},
    )
    mapped = tmp_path / "answer.json"
    mapped.write_text(answer.model_dump_json())
    page.give_file(f"{A} .open", mapped)
    wanted = answer.choices[0]
    page.until(f"document.querySelector('{A} .slider').max === '{_steps(wanted)}'")
    text = "".join(one.token for one in wanted.logprobs.content)
    assert page.text(f"{A} .canvas") == text


def _steps(choice: object) -> int:
    return max(choice.step_map["steps"]) + 1  # type: ignore[attr-defined]


# -- in the terminal -----------------------------------------------------------------


def test_chat_is_plain_without_a_terminal(server: Server, capsys):
    wanted = server.chat(QUESTION, max_tokens=40).choices[0].message.content
    assert main(["chat", server.url, "--max-tokens", "40", "--prompt", QUESTION]) == 0
    assert capsys.readouterr().out == wanted + "\n"


def test_chat_shows_the_canvas_in_a_terminal(server: Server, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    asked = ["--max-tokens", "40", "--strategy", "static", "--prompt", QUESTION]
    assert main(["chat", f"{server.url}/v1", *asked]) == 0
    shown = capsys.readouterr().out
    wanted = server.chat(QUESTION, max_tokens=40, vllm_xargs={"dlm_strategy": "static"})
    assert wanted.choices[0].message.content in shown
    assert "\N{MEDIUM SHADE}" in shown
    assert "tokens per forward" in shown
    assert "\x1b[" in shown


def test_chat_says_what_is_refused(server: Server, capsys):
    asked = ["--dlm", '{"block_lenght": 8}', "--prompt", QUESTION]
    assert main(["chat", server.url, *asked]) == 2
    assert "block_length" in capsys.readouterr().err
    assert main(["chat", server.url, "--model", "other"]) == 2
    assert "no model 'other'" in capsys.readouterr().err
    assert main(["chat", "http://127.0.0.1:9", "--prompt", "x"]) == 2
    assert "no server answers" in capsys.readouterr().err
