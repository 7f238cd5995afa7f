# SPDX-License-Identifier: Apache-2.0
"""Problems of llada-forms with tools: calls, and what is no call."""

from __future__ import annotations

import json
import random

from vllm_dlm.tasks.forms import tools, values
from vllm_dlm.tasks.forms.pieces import SYSTEM, Piece, Problem, Turn, free

NO_TOOL = "No tool here fits this."


def tool_turns(rng: random.Random, text: str) -> tuple[Turn, ...]:
    user = Turn("user", text)
    return (Turn("system", rng.choice(SYSTEM)), user) if rng.random() < 0.1 else (user,)


def call(rng: random.Random, held_out: bool) -> Problem:
    use = tools.draw_tool_use(rng, held_out, 1)
    text = tools.write_calls(use.calls)
    return Problem("call", tool_turns(rng, use.request), free(text), tools=use.tools)


def two_calls(rng: random.Random, held_out: bool) -> Problem:
    use = tools.draw_tool_use(rng, held_out, 2)
    text = tools.write_calls(use.calls)
    turns = tool_turns(rng, use.request)
    return Problem("two calls", turns, free(text), tools=use.tools)


def no_tool(rng: random.Random, held_out: bool) -> Problem:
    use = tools.draw_tool_use(rng, held_out, 0)
    turns = tool_turns(rng, use.request)
    return Problem("no tool", turns, free(NO_TOOL), tools=use.tools)


def forced_call(rng: random.Random, held_out: bool) -> Problem:
    """What vLLM has a model write for `tool_choice` required, or a named tool.

    The text's first tokens stand: they tell these forms from a call by choice.
    """
    use = tools.draw_tool_use(rng, held_out, 1 if rng.random() < 0.7 else 2)
    if rng.random() < 0.6:
        calls = [
            {"name": call.name, "parameters": dict(call.arguments)}
            for call in use.calls
        ]
        text = json.dumps(calls, ensure_ascii=False)
        schema = tools.calls_schema(use.tools)
        given = rng.choice(('[{"', '[{"name": "'))
    else:
        # The arguments of the tool that was named, on their own.
        use = tools.draw_tool_use(rng, held_out, 1)
        [call] = use.calls
        text = json.dumps(dict(call.arguments), ensure_ascii=False)
        [schema] = (tool.schema for tool in use.tools if tool.name == call.name)
        given = rng.choice(('{"', text[: text.index(":")] + ": "))
        if text.startswith(f'{given}"'):
            given += '"'
    pieces = (Piece(given, False), Piece(text.removeprefix(given), True))
    turns = tool_turns(rng, use.request)
    return Problem("forced call", turns, pieces, tools=use.tools, schema=schema)


def tool_result(rng: random.Random, held_out: bool) -> Problem:
    """What a tool has answered is told to the user."""
    use = tools.draw_tool_use(rng, held_out, 1)
    result = rng.choice(
        (
            values.city(rng, held_out),
            values.clock(rng, held_out),
            str(rng.randint(1, 999)),
            f"{rng.choice(values.COLORS)} {values.city(rng, held_out)}",
        )
    )
    turns = (
        *tool_turns(rng, use.request),
        Turn("assistant", tools.write_calls(use.calls)),
        Turn("tool", result),
    )
    return Problem(
        "tool result", turns, free(f"The result is: {result}"), tools=use.tools
    )
