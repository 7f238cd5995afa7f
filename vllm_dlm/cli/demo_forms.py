# SPDX-License-Identifier: Apache-2.0
"""The second half of `make demo`: llada-forms with schemas, holes and tools."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from vllm_dlm.cli.demo_server import Served, console, serve

MODEL = "llada-forms"
SENTENCE = "Ada lives in Rome and is 31."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "city": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
FORM = "Name: {{name:8}}\nCity: {{city:8}}"


def show() -> None:
    """Start a server of llada-forms, and ask it."""
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with serve(MODEL, *flags) as served:
        ask(served)


def ask(served: Served) -> None:
    """Ask a server of llada-forms: who it is, a schema, a form, a gap, a tool."""
    _print("chat", "Hello, who are you?", _chat(served, "Hello, who are you?"))
    schema = {"name": "person", "schema": SCHEMA, "strict": True}
    held = {"response_format": {"type": "json_schema", "json_schema": schema}}
    _print("response_format", SENTENCE, _chat(served, SENTENCE, **held))
    form = {"dlm_canvas_text": FORM, "dlm_holes": "shrink"}
    _print("canvas_text", f"{SENTENCE}  {FORM!r}", _form(served, form))
    _print_gap(served)
    asked = "What is the weather in Oslo?"
    _print("tools", asked, _chat(served, asked, tools=[WEATHER]))


def compare(num_problems: int) -> None:
    """Held-out sentences, offline: how many become the right JSON."""
    from vllm_dlm.entrypoints.llm import LLM
    from vllm_dlm.tasks.forms.evaluation import answer
    from vllm_dlm.tasks.forms.problems import held_out_problems

    llm = LLM(MODEL, max_num_seqs=16)
    problems = held_out_problems("listed", max(1, num_problems), 0)
    table = Table(
        title=f"{MODEL}, {len(problems)} sentences, fields named in the prompt"
    )
    for column in ("", "JSON", "right", "forwards/request"):
        table.add_column(column, justify="right" if column else "left")
    for name, with_schema in (("free", False), ("with the schema", True)):
        found = answer(llm, problems, with_schema=with_schema)
        table.add_row(
            name, f"{found.valid:.1%}", f"{found.right:.1%}", f"{found.forwards:.2f}"
        )
    llm.llm_engine.engine_core.shutdown()
    console.print(table)


def _reply(served: Served, text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 96, **more}
    with served.post("/v1/chat/completions", body) as reply:
        choice: dict[str, Any] = json.load(reply)["choices"][0]
    return choice


def _chat(served: Served, text: str, **more: Any) -> str:
    message = _reply(served, text, **more)["message"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    if calls:
        return ", ".join(f"{call['name']}({call['arguments']})" for call in calls)
    return str(message["content"])


def _form(served: Served, xargs: dict[str, str]) -> str:
    # The canvas says how long the answer is.
    choice = _reply(served, SENTENCE, vllm_xargs=xargs, max_tokens=None)
    return f"{choice['message']['content']!r}  fields: {choice['canvas_fields']}"


def _print_gap(served: Served) -> None:
    prompt, suffix = '{"name": "', f'", "age": 31}}\n{SENTENCE}'
    body = {
        **{"prompt": prompt, "suffix": suffix, "max_tokens": 6, "temperature": 0},
        "vllm_xargs": {"dlm_holes": "shrink"},
    }
    with served.post("/v1/completions", body) as reply:
        text = json.load(reply)["choices"][0]["text"]
    _print("suffix", f"{prompt}[gap]{suffix}", text)


def _print(how: str, question: str, answer: str) -> None:
    console.print(f"[bold]{how}[/]\n  Q: ", end="")
    console.print(question, markup=False)
    console.print("  A: ", end="")
    console.print(answer, markup=False)
