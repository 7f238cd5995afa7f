# SPDX-License-Identifier: Apache-2.0
"""What the page's server answers, what it passes on, and what it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.watching.forms import OPTIONS, forms
from vllm_dlm.watching.page_server import LARGEST_BODY, PageServer, model_server


class Upstream(BaseHTTPRequestHandler):
    """A server that says what it was asked, in two parts; it refuses without a key."""

    may_go_on = threading.Event()

    def do_GET(self) -> None:
        self._reply(b"")

    def do_POST(self) -> None:
        self._reply(self.rfile.read(int(self.headers["Content-Length"])))

    def _reply(self, body: bytes) -> None:
        key = self.headers.get("Authorization")
        self.send_response(200 if key == "Bearer secret" else 401)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(f"data: {self.command} {self.path}\n\n".encode())
        self.wfile.flush()
        if body == b'"slowly"':
            self.may_go_on.wait(60)
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def pages() -> Iterator[PageServer]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Upstream)]
    url = f"http://127.0.0.1:{servers[0].server_port}"
    servers.append(PageServer(url, "secret"))
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    yield servers[1]  # type: ignore[misc]
    for server in servers:
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


def test_the_page_is_one_file(pages: PageServer):
    reply = httpx.get(pages.address)
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    for outside in ("http://", "https://", "src=", "@import"):
        assert outside not in reply.text, outside
    assert "secret" not in reply.text


def test_forms_follow_from_the_declarations(pages: PageServer):
    found = httpx.get(f"{pages.address}forms").json()
    assert found == {**forms(), "server": pages.url}
    assert [one["name"] for one in found["strategies"]] == [*STRATEGIES]
    by_name = {one["name"]: one for one in found["strategies"]}
    threshold = by_name["threshold"]["parameters"]["threshold"]
    assert threshold["type"] == "number"
    assert threshold["description"]
    assert by_name["multi_block"]["presets"]
    assert [*found["options"]] == [*OPTIONS]
    assert "$ref" not in json.dumps(found)


def test_it_passes_on_with_the_key(pages: PageServer):
    reply = httpx.get(f"{pages.address}v1/models")
    assert (reply.status_code, reply.text) == (200, "data: GET /v1/models\n\n")
    reply = httpx.post(f"{pages.address}v1/completions", json={"a": 1})
    assert reply.text == 'data: POST /v1/completions\n\n{"a":1}'
    assert reply.headers["Content-Type"] == "text/event-stream"


def test_parts_come_at_once(pages: PageServer):
    Upstream.may_go_on.clear()
    with httpx.stream("POST", f"{pages.address}v1/completions", json="slowly") as reply:
        parts = reply.iter_text()
        assert next(parts) == "data: POST /v1/completions\n\n"
        Upstream.may_go_on.set()
        assert "".join(parts) == '"slowly"'


def test_what_it_refuses(pages: PageServer):
    """Pages of other sites; routes that the page does not need; other types."""
    for headers in (
        {"Host": f"evil.example:{pages.server_port}"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
    ):
        for ask in (httpx.get, httpx.post):
            reply = ask(f"{pages.address}v1/models", headers=headers)
            assert reply.status_code == 403
    assert httpx.get(f"{pages.address}v1/metrics").status_code == 404
    assert (
        httpx.post(f"{pages.address}v1/load_lora_adapter", json={}).status_code == 404
    )
    path = f"{pages.address}v1/completions"
    assert httpx.post(path, data={"a": "1"}).status_code == 415
    large = {"Content-Type": "application/json"}
    reply = httpx.post(path, content=b" " * (LARGEST_BODY + 1), headers=large)
    assert reply.status_code == 413


def test_refusals_and_absences_are_told():
    with PageServer("http://127.0.0.1:9", None) as pages:
        thread = threading.Thread(target=pages.serve_forever)
        thread.start()
        reply = httpx.get(f"{pages.address}v1/models")
        pages.shutdown()
        thread.join()
    assert reply.status_code == 502
    message = reply.json()["error"]["message"]
    assert "no model server answers at http://127.0.0.1:9" in message


def test_addresses():
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert model_server(url) == "http://a:1"
    assert model_server("https://a/models/x/v1") == "https://a/models/x"
    for url in ("localhost:8000", "ftp://a", "http://", "a"):
        with pytest.raises(ValueError, match="no address of a server"):
            model_server(url)
    with pytest.raises(ValueError, match="--api-key"):
        model_server("http://key@a:1")


def test_arguments(capsys):
    for argv, said in (
        (["watch", "nonsense", "--no-browser"], "no address of a server"),
        (["chat", "llada-tiny", "--model", "x"], "--model is for a server"),
        (["chat", "llada-tiny", "--api-key", "x"], "--api-key is for a server"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err
    for argv, said in (
        (["watch", "http://a", "--port", "70000"], "is no port"),
        (["watch", "http://a", "--host", "0.0.0.0"], "every address"),
        (["chat", "http://a", "--dlm", "x"], "is no JSON"),
        (["chat", "http://a", "--dlm", "[]"], "is no JSON object"),
        (["chat", "http://a", "--max-tokens", "0"], "whole number"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert said in capsys.readouterr().err
