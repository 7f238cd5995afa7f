# SPDX-License-Identifier: Apache-2.0
"""A small server for one user: the page, and a way on to the model server.

The page could be opened as a file and ask the model server itself, if that allowed
other origins and the page held its API key. This server needs neither: the page has one
origin, and the key stays in this process. It listens on this machine, answers requests
by its own names only (another site's page may have a name point here), and passes on
no more than the routes that the page needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from http.client import HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from vllm_dlm.watching.forms import forms

PASSED_ON = {
    "GET": ("/v1/models",),
    "POST": ("/v1/completions", "/v1/chat/completions"),
}
"""Routes of the model server that are passed on."""

LARGEST_BODY = 1 << 20
"""Bytes of a request that is passed on."""

CHUNK = 1 << 16
SILENCE_SECONDS = 600
"""The longest time without a word from the model server: a request may be queued."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""The page is one file, and asks nobody but this server."""


def model_server(url: str) -> str:
    """The address of a model server, without the API's own path.

    Args:
        url: with or without "/v1" at its end, as clients are given it.

    Raises:
        ValueError: it is no address of an HTTP server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{url!r} is no address of a server; expected one like "
            "http://localhost:8000"
        )
    if parts.query or parts.fragment or parts.username:
        raise ValueError(
            f"{url!r}: expected an address alone; a key goes into --api-key or into "
            "the environment variable VLLM_API_KEY"
        )
    return url.rstrip("/").removesuffix("/v1")


class PageServer(ThreadingHTTPServer):
    """Serves the page; see the module docstring.

    Args:
        url: of the model server, as `model_server` returns it.
        api_key: that the model server asks for; None for none.
        host, port: where to listen; port 0 takes a free one.
    """

    daemon_threads = True

    def __init__(
        self, url: str, api_key: str | None, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        super().__init__((host, port), _Handler)
        self.url = url
        self.host = host
        self.api_key = api_key
        self.page = (files("vllm_dlm.watching") / "page.html").read_bytes()
        # Names of other machines are other people's to give.
        own = {"localhost", "127.0.0.1", "[::1]", host}
        self.names = {f"{name}:{self.server_port}" for name in own}

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{self.host}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version = "vllm-dlm"
    sys_version = ""

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
        elif path == "/forms":
            self._answer_json(HTTPStatus.OK, {**forms(), "server": self.server.url})
        else:
            self._pass_on("GET", path, None)

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        # A form of another site cannot have this type without asking first.
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        if kind != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
            return
        size = self.headers.get("Content-Length", "")
        if not size.isdigit() or int(size) > LARGEST_BODY:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"a request has at most {LARGEST_BODY} bytes, and says how many",
            )
            return
        self._pass_on("POST", urlsplit(self.path).path, self.rfile.read(int(size)))

    def _is_for_us(self) -> bool:
        """Whether a request is of the page; if not, it is refused."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host in self.server.names and origin in (None, f"http://{host}"):
            return True
        self._refuse(
            HTTPStatus.FORBIDDEN,
            f"this server answers its own page alone, at {self.server.address}",
        )
        return False

    def _pass_on(self, method: str, path: str, body: bytes | None) -> None:
        if path not in PASSED_ON[method]:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {path} here")
            return
        headers = {"Content-Type": "application/json"}
        if self.server.api_key is not None:
            headers["Authorization"] = f"Bearer {self.server.api_key}"
        asked = Request(self.server.url + path, body, headers, method=method)
        try:
            reply = urlopen(asked, timeout=SILENCE_SECONDS)
        except HTTPError as error:
            # What a server refuses, it says why.
            reply = error
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            self._refuse(
                HTTPStatus.BAD_GATEWAY,
                f"no model server answers at {self.server.url} ({reason})",
            )
            return
        with reply:
            self._send_head(
                reply.status, reply.headers.get("Content-Type", "text/plain"), None
            )
            # Who closes the page ends the request: the next write fails.
            with suppress(ConnectionError):
                for part in _parts(reply):
                    self.wfile.write(part)
                    self.wfile.flush()

    # -- answers -----------------------------------------------------------

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer_json(status, {"error": {"message": why, "code": status}})

    def _answer_json(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        self._answer(status, "application/json", json.dumps(body).encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self._send_head(status, kind, len(body))
        with suppress(ConnectionError):
            self.wfile.write(body)

    def _send_head(self, status: int, kind: str, size: int | None) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is for the address."""


def _parts(reply: HTTPResponse | HTTPError) -> Iterator[bytes]:
    """What a server says, as soon as it comes."""
    while part := reply.read1(CHUNK):
        yield part
