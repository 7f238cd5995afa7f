# SPDX-License-Identifier: Apache-2.0
"""`make demo`: serve llada-tiny, ask it over HTTP, compare its strategies offline."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.table import Table

from vllm_dlm.tasks.problems import Problem, sample_problems

MODEL = "llada-tiny"
MAX_TOKENS = 256
START_SECONDS = 300
console = Console()


def main() -> int:
    """Run the demo; the exit status is 0 if everything worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--num-problems",
        type=int,
        default=200,
        help="held-out problems per strategy (default: %(default)s)",
    )
    args = parser.parse_args()
    console.rule("1. vllm serve --model llada-tiny --dlm-strategy learn2pd")
    with _server() as url:
        _ask(url)
    console.rule(f"2. {args.num_problems} held-out problems offline, per strategy")
    _compare(sample_problems(args.num_problems, 0, split="heldout"))
    return 0


# -- the server -----------------------------------------------------------


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """A running `vllm serve`; yields its URL and stops it in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", "--model", MODEL, "--dlm-strategy", "learn2pd"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield url
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


def _post(url: str, body: dict[str, Any]) -> Any:
    data = json.dumps({"model": MODEL, **body}).encode()
    headers = {"Content-Type": "application/json"}
    return urlopen(Request(url, data, headers), timeout=120)


def _ask(url: str) -> None:
    problems = sample_problems(5, seed=1, split="heldout")
    for problem in problems[:2]:
        body = {"prompt": problem.question, "max_tokens": MAX_TOKENS}
        with _post(f"{url}/v1/completions", body) as reply:
            _print("completion", problem, json.load(reply)["choices"][0]["text"])
    for problem in problems[2:4]:
        messages = [{"role": "user", "content": problem.question}]
        body = {"messages": messages, "max_tokens": MAX_TOKENS}
        with _post(f"{url}/v1/chat/completions", body) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
        _print("chat", problem, text)
    # Streamed, and by another strategy than the server's: one request's own choice.
    problem = problems[4]
    messages = [{"role": "user", "content": problem.question}]
    xargs = {"dlm_strategy": "threshold", "dlm_threshold": 0.95}
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "stream": True}
    with _post(f"{url}/v1/chat/completions", {**body, "vllm_xargs": xargs}) as reply:
        pieces = [piece for line in reply if (piece := _piece(line.decode()))]
    _print("streamed, threshold 0.95", problem, "|".join(pieces))


def _piece(line: str) -> str:
    """The text of one server-sent event."""
    if not line.startswith("data: {"):
        return ""
    return json.loads(line[6:])["choices"][0]["delta"].get("content") or ""


def _print(how: str, problem: Problem, answer: str) -> None:
    right = problem.check(answer.replace("|", ""))
    verdict = "[green]right[/]" if right else f"[red]not {problem.answer!r}[/]"
    console.print(f"[bold]{how}[/]\n  Q: ", end="")
    console.print(problem.question, markup=False)
    console.print("  A: ", end="")
    console.print(answer, markup=False, end="  ")
    console.print(f"({verdict})")


# -- the strategies -------------------------------------------------------


def _compare(problems: list[Problem]) -> None:
    # The table is the point here; the server above has logged what vLLM has to say.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_dlm.entrypoints.llm import LLM
    from vllm_dlm.tasks.evaluation import evaluate_served

    llm = LLM(MODEL, max_num_seqs=32)
    table = Table(title=f"{MODEL}, canvas {MAX_TOKENS}, block 32, cache none")
    for column in ("strategy", "accuracy", "forwards/request", "tokens/forward"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    table.add_column("tokens/s", justify="right")
    for strategy in ("static", "threshold", "factor", "learn2pd"):
        console.print(f"[bold]{strategy}[/]")
        served = evaluate_served(
            llm, problems, {"strategy": strategy}, max_tokens=MAX_TOKENS
        )
        table.add_row(
            strategy,
            f"{served.accuracy:.1%}",
            f"{served.forwards_per_request:.2f}",
            f"{served.tokens_per_forward:.2f}",
            f"{served.tokens_per_second:.0f}",
        )
    llm.llm_engine.engine_core.shutdown()
    console.print(table)
    console.print(
        "A request ends at its end-of-text token, so `static` spends at most one block "
        f"of 32 forwards here; LLaDA's own loop would spend all {MAX_TOKENS}."
    )


if __name__ == "__main__":
    sys.exit(main())
