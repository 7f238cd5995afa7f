# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm watch URL`: a page on which a server's canvases fill."""

from __future__ import annotations

import argparse
import os
import webbrowser

from vllm_dlm.watching.page_server import PageServer, model_server

KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
"""Where a key is looked for, in this order."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "url", metavar="URL", help="a running server, as http://localhost:8000"
    )
    add_key_argument(parser)
    parser.add_argument(
        "--host",
        type=host,
        default="127.0.0.1",
        help="address to listen at, by which the page is opened (default: %(default)s, "
        "this machine alone). Whoever can reach the page can use the model server with "
        "your key",
    )
    parser.add_argument(
        "--port",
        type=port,
        default=8765,
        help="0 takes a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--no-browser", action="store_true", help="print the address alone"
    )


def add_key_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--api-key`."""
    parser.add_argument(
        "--api-key",
        help=f"the server's API key (default: ${', or $'.join(KEY_VARIABLES)})",
    )


def api_key(args: argparse.Namespace) -> str | None:
    """The key to send; None for none."""
    keys = (args.api_key, *map(os.environ.get, KEY_VARIABLES))
    return next((key for key in keys if key), None)


def host(text: str) -> str:
    """An argument's type: one address, for the page answers to no other."""
    if text in ("0.0.0.0", "::", ""):
        raise argparse.ArgumentTypeError(
            f"{text!r} is every address of this machine: name the one by which the "
            "page is to be opened"
        )
    return text


def port(text: str) -> int:
    """An argument's type: a TCP port."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535 are")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    server = PageServer(model_server(args.url), api_key(args), args.host, args.port)
    with server:
        print(f"The page is at {server.address} (Ctrl+C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
