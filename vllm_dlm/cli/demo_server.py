# SPDX-License-Identifier: Apache-2.0
"""The servers of `make demo`: one `vllm serve` at a time, asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from rich.console import Console

START_SECONDS = 300
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", "--model", model, *flags),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield Served(url, model)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            console.print("server stopped")


def _wait(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    started = time.monotonic()
    with console.status("") as status:
        while True:
            seconds = time.monotonic() - started
            status.update(f"starting the server, {seconds:.0f} s")
            with contextlib.suppress(URLError, OSError), urlopen(f"{url}/health"):
                break
            if process.poll() is not None or seconds > START_SECONDS:
                log.seek(0)
                console.print(log.read()[-4000:], markup=False)
                raise SystemExit("the server did not start; its log ends above")
            time.sleep(0.5)
    console.print(f"server up after {time.monotonic() - started:.0f} s at {url}")
