# SPDX-License-Identifier: Apache-2.0
"""Makes docs/pictures/watch.png: `python -m server.picture URL FILE`, in `tests/`.

URL is that of a server of llada-tiny.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

from server.browser import browser

from vllm_dlm.watching.page_server import PageServer, model_server

QUESTION = "Shuffle [Hugo, Rosa, Nina, Bela, Ivan]"
A, B = "#panes > section:nth-child(1)", "#panes > section:nth-child(2)"
END = "document.querySelector('#status').textContent.startsWith('Finished')"


def main(url: str, picture: str) -> None:
    with (
        PageServer(model_server(url), None) as pages,
        tempfile.TemporaryDirectory() as folder,
        browser(Path(folder)) as page,
    ):
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        page.open(pages.address)
        for selector, value in (
            ("#prompt", QUESTION),
            ("#max_tokens", "64"),
            ("#compare", "on"),
            ("#in-turn", "on"),
            (f"{A} .strategy", "static"),
            (f"{B} .strategy", "threshold"),
        ):
            page.set(selector, value)
        # Once before: a server's first requests take longer.
        for _ in range(2):
            page.evaluate("document.querySelector('#run').click()")
            page.until("document.querySelector('#status').textContent === 'Running.'")
            page.until(END)
        # Half way, on the left.
        page.evaluate(
            f"""(() => {{
              const slider = document.querySelector('{A} .slider');
              slider.value = Math.ceil(slider.max / 2);
              slider.dispatchEvent(new Event("input"));
            }})()"""
        )
        page.until(
            "document.getAnimations().every((one) => one.playState === 'finished')"
        )
        page.screenshot(Path(picture))
        pages.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
