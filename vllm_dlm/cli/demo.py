# SPDX-License-Identifier: Apache-2.0
"""`make demo`: serve llada-tiny, ask it over HTTP, compare its strategies offline.

Then sdar-tiny, which is block-causal (`demo_blocks.py`), and llada-forms: schemas, text
with holes, tools (`demo_forms.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from rich.table import Table

from vllm_dlm.cli import demo_blocks, demo_forms
from vllm_dlm.cli.demo_server import Served, console, serve
from vllm_dlm.tasks.problems import Problem, sample_problems

MODEL = "llada-tiny"
MAX_TOKENS = 256


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
    with serve(MODEL, "--dlm-strategy", "learn2pd") as served:
        _ask(served)
    console.rule(f"2. {args.num_problems} held-out problems offline, per strategy")
    _compare(sample_problems(args.num_problems, 0, split="heldout"))
    console.rule("3. vllm serve --model sdar-tiny: blocks, and a chat's cached prefix")
    demo_blocks.show()
    console.rule("4. vllm serve --model llada-forms: schema, holes, tools")
    demo_forms.show()
    console.rule("5. held-out sentences to JSON, with their schemas and without")
    demo_forms.compare(args.num_problems // 4)
    return 0


def _ask(served: Served) -> None:
    problems = sample_problems(5, seed=1, split="heldout")
    for problem in problems[:2]:
        body = {"prompt": problem.question, "max_tokens": MAX_TOKENS}
        with served.post("/v1/completions", body) as reply:
            _print("completion", problem, json.load(reply)["choices"][0]["text"])
    for problem in problems[2:4]:
        messages = [{"role": "user", "content": problem.question}]
        body = {"messages": messages, "max_tokens": MAX_TOKENS}
        with served.post("/v1/chat/completions", body) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
        _print("chat", problem, text)
    # Streamed, and by another strategy than the server's: one request's own choice.
    problem = problems[4]
    messages = [{"role": "user", "content": problem.question}]
    xargs = {"dlm_strategy": "threshold", "dlm_threshold": 0.95}
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "stream": True}
    with served.post("/v1/chat/completions", {**body, "vllm_xargs": xargs}) as reply:
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
