# SPDX-License-Identifier: Apache-2.0
"""The servers of `make demo`: one `vllm serve` at a time, asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from rich.console import Console

from vllm_dlm.cli.server_process import VLLM, ServerFailed, serving

console = Console()


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    model: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The open reply to a request of this server's model."""
        data = json.dumps({"model": self.model, **body}).encode()
        headers = {"Content-Type": "application/json"}
        return urlopen(Request(f"{self.url}{path}", data, headers), timeout=120)


@contextlib.contextmanager
def serve(model: str, *flags: str) -> Iterator[Served]:
    """A running `vllm serve`, stopped in the end."""
    command = [VLLM, "serve", "--model", model, *flags]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status("starting the server"))
        server = serving(
            command,
            Path(folder, "log"),
            waiting=lambda seconds: status.update(
                f"starting the server, {seconds:.0f} s"
            ),
        )
        try:
            url = stack.enter_context(server)
        except ServerFailed as error:
            status.stop()
            console.print(str(error), markup=False)
            raise SystemExit("the server did not start; its log ends above") from None
        status.stop()
        console.print(f"server up after {time.monotonic() - started:.0f} s at {url}")
        yield Served(url, model)
    console.print("server stopped")
