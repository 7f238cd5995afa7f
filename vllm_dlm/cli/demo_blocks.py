# SPDX-License-Identifier: Apache-2.0
"""The part of `make demo` with sdar-tiny: a block-causal model keeps its keys.

llada-tiny sees its whole canvas from the prompt, so that the prompt's keys change with
every token written. Here what stands left of a block stays, within an answer and from
one turn of a chat to the next: prefix caching finds it again.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.request import urlopen

from rich.table import Table

from vllm_dlm.cli.demo_server import Served, console, serve
from vllm_dlm.tasks.problems import sample_problems

MODEL = "sdar-tiny"
TURNS = 6
# Tokens of a KV page; of the usual 128, this short chat would share none at first.
PAGE = 32
MAX_TOKENS = 32


def show() -> None:
    """Chat with a server of sdar-tiny, and show what each turn found in the cache."""
    flags = ("--block-size", str(PAGE), "--enable-prompt-tokens-details")
    with serve(MODEL, *flags) as served:
        table = Table(title=f"{MODEL}, a chat of {TURNS} turns, pages of {PAGE} tokens")
        for column in ("turn", "question", "answer", "", "prompt tokens", "cached"):
            right = column in ("turn", "prompt tokens", "cached")
            table.add_column(column, justify="right" if right else "left")
        messages: list[dict[str, str]] = []
        for number, problem in enumerate(sample_problems(TURNS, 3, split="heldout"), 1):
            messages.append({"role": "user", "content": problem.question})
            answer, usage = _chat(served, messages)
            messages.append({"role": "assistant", "content": answer})
            verdict = "[green]right[/]" if problem.check(answer) else "[red]wrong[/]"
            cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
            table.add_row(
                *(str(number), _plain(problem.question), _plain(answer), verdict),
                *(str(usage["prompt_tokens"]), str(cached)),
            )
        console.print(table)
        hits, asked = (_counter(served, name) for name in ("hits", "queries"))
        console.print(
            f"/metrics: prefix_cache_hits {hits:.0f} of prefix_cache_queries "
            f"{asked:.0f} tokens. A server of llada-tiny has no hits: its prompt sees "
            "the canvas."
        )


def _chat(served: Served, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
    body = {"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    with served.post("/v1/chat/completions", body) as reply:
        found = json.load(reply)
    return found["choices"][0]["message"]["content"], found["usage"]


def _counter(served: Served, name: str) -> float:
    """The sum of vLLM's counter of prefix cache hits or queries, in tokens."""
    with urlopen(f"{served.url}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    wanted = f"vllm:prefix_cache_{name}_total"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(wanted))


def _plain(text: str) -> str:
    """A text whose brackets are no markup."""
    return text.replace("[", r"\[")
