# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm chat MODEL_OR_URL`: a conversation in the terminal, canvases and all.

Where the output is no terminal, answers are printed as text and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vllm_dlm.cli.arguments import count
from vllm_dlm.watching.cells import COLOURS, Cells, harmless
from vllm_dlm.watching.page_server import model_server
from vllm_dlm.watching.sources import EngineSource, Message, ServerSource, Source
from vllm_dlm.watching.watch import add_key_argument, api_key

FRAMES_PER_SECOND = 20
"""At most; what a terminal over a network can show."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "model_or_url",
        metavar="MODEL_OR_URL",
        help="a running server, as http://localhost:8000; or a model, which is then "
        "loaded here: a folder, a hub id, or a short name of `vllm-dlm models`",
    )
    parser.add_argument("--model", help="of a server that has several: which")
    add_key_argument(parser)
    parser.add_argument("--prompt", help="ask this one question and end")
    parser.add_argument("--strategy", help="of decoding (default: the server's own)")
    parser.add_argument(
        "--dlm",
        type=_options,
        default={},
        metavar="JSON",
        help="further options of a request, as '{\"block_length\": 16}'",
    )
    parser.add_argument(
        "--max-tokens", type=count, default=256, help="default: %(default)s"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, help="default: none")
    parser.add_argument(
        "--colour",
        "--color",
        choices=COLOURS,
        default="step",
        help="what a token's colour stands for (default: %(default)s)",
    )


def _options(text: str) -> dict[str, Any]:
    """An argument's type: options as a JSON object."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return options


def run(args: argparse.Namespace) -> int:
    """Ask and answer until the input ends."""
    source = _source(args)
    console = Console(highlight=False)
    messages: list[Message] = []
    for question in _questions(args.prompt, console):
        messages.append({"role": "user", "content": question})
        try:
            answer = _answer(source, messages, console, args.colour)
        except ValueError as error:
            if args.prompt is not None:
                raise
            # What is refused is not part of the conversation.
            messages.pop()
            print(f"vllm-dlm: {error}", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": answer})
    return 0


def _source(args: argparse.Namespace) -> Source:
    """Who answers, as the arguments say."""
    dlm = dict(args.dlm)
    if args.strategy is not None:
        dlm["strategy"] = args.strategy
    options = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.seed is not None:
        options["seed"] = args.seed
    if "://" in args.model_or_url:
        url = model_server(args.model_or_url)
        return ServerSource(url, args.model, api_key(args), options, dlm)
    for name in ("model", "api_key"):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is for a server; leave it out, or name a URL")
    return EngineSource(args.model_or_url, options, dlm)


def _questions(prompt: str | None, console: Console) -> Iterator[str]:
    """One question, or all that are typed until the input ends."""
    if prompt is not None:
        yield prompt
        return
    is_typed = sys.stdin.isatty() and console.is_terminal
    while True:
        try:
            line = console.input("[bold]> [/]") if is_typed else input()
        except EOFError:
            return
        if line.strip():
            yield line


def _answer(
    source: Source, messages: list[Message], console: Console, colour: str
) -> str:
    """Print an answer, on a terminal while its canvas fills."""
    if not console.is_terminal:
        answer = source.answer(messages, lambda cells: None)
        print(answer, flush=True)
        return answer
    started = time.monotonic()
    last: list[Cells] = []
    with Live(
        console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True
    ) as live:

        def see(cells: Cells) -> None:
            last[:] = [cells]
            live.update(cells.shown(console, colour, time.monotonic() - started))

        answer = source.answer(messages, see)
    console.print(Text(harmless(answer)))
    for cells in last:
        console.print(Text(cells.facts(time.monotonic() - started), "dim"))
    return answer
