# SPDX-License-Identifier: Apache-2.0
"""A real browser without a window, driven by its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60
"""A limit against hanging, generous: cores may be shared."""


def browser_command() -> str:
    """The browser there is; a test is skipped where there is none."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    pytest.skip(
        f"there is no browser here (looked for {', '.join(NAMES)}): on Debian, "
        "`apt-get install chromium`"
    )


class Page:
    """A tab."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        """What the page's script and its console have complained of."""
        for domain in ("Page", "Runtime", "Log", "DOM", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._numbers)
        self._connection.send(
            json.dumps({"id": number, "method": method, "params": params})
        )
        while True:
            message = json.loads(self._connection.recv(timeout=SECONDS))
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        if message.get("method") == "Log.entryAdded":
            entry = params["entry"]
            if entry["level"] == "error":
                self.errors.append(f"{entry['text']} {entry.get('url')}")

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page; of a promise, what it becomes."""
        found = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until an expression is true, at the rate at which the page is drawn."""
        ended = self.evaluate(
            f"""new Promise((resolve) => {{
              const end = performance.now() + {SECONDS * 1000};
              const look = () => {{
                if ({condition}) resolve(true);
                else if (performance.now() > end) resolve(false);
                else setTimeout(look, 10);
              }};
              look();
            }})"""
        )
        assert ended, (
            f"not reached: {condition}; {self.evaluate('document.body.innerText')}"
        )

    def open(self, url: str) -> None:
        """Go to a page whose script says when it is ready."""
        self.send("Page.navigate", url=url)
        self.until("document.querySelector('#status')?.textContent === 'Ready.'")

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(
            self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")
        )

    def set(self, selector: str, value: str) -> None:
        """Choose a value in a form."""
        self.evaluate(
            f"""(() => {{
              const input = document.querySelector({json.dumps(selector)});
              const value = {json.dumps(value)};
              if (input.type === "checkbox") input.checked = value === "on";
              else input.value = value;
              input.dispatchEvent(new Event("change", {{ bubbles: true }}));
            }})()"""
        )

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key where the focus is; modifiers: 2 is Ctrl."""
        codes = {"Enter": 13, "Tab": 9, "Home": 36, "End": 35, "ArrowRight": 39}
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                modifiers=modifiers,
            )

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node["nodeId"])

    def scheme(self, name: str) -> None:
        """Prefer "dark" or "light"."""
        feature = {"name": "prefers-color-scheme", "value": name}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """The whole page as a picture."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A tab of a browser of its own.

    Args:
        profile: a folder for it.
    """
    process = subprocess.Popen(
        [
            *(browser_command(), "--headless=new", "--remote-debugging-port=0"),
            # In a container there is none; the pages are our own.
            *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--window-size=1280,900"),
            *(f"--user-data-dir={profile}", "about:blank"),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "DevTools listening on" in line:
                break
        else:
            pytest.fail(f"the browser did not start: {''.join(said)}")
        address = line.split("ws://")[1].partition("/")[0]
        tabs = httpx.get(f"http://{address}/json/list", timeout=SECONDS).json()
        tab = next(one for one in tabs if one["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as connection:
            yield Page(connection)
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
        process.stderr.close()
