# SPDX-License-Identifier: Apache-2.0
"""Tools that a request may offer, and what a user says to have one called."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dlm.tasks.forms import values
from vllm_dlm.tasks.forms.records import Value

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class _Argument:
    names: tuple[str, ...]
    draw: Callable[[random.Random, bool], Value]
    schema: str = "string"


@dataclass(frozen=True)
class _ToolKind:
    names: tuple[str, ...]
    arguments: tuple[_Argument, ...]
    requests: tuple[str, ...]
    """What a user says, with `{0}` for the first argument's value, and so on."""
    doubled: str = ""
    """What a user says to have the tool called twice, with `{0}` and `{1}`."""


_CITY = _Argument(("city", "place", "location", "town"), values.city)
_PERSON = _Argument(("name", "person", "to", "who"), values.first_name)

_KINDS = (
    _ToolKind(
        ("get_weather", "weather", "check_weather", "weather_report"),
        (_CITY,),
        ("What is the weather in {0}?", "How is the weather in {0}?", "Weather in {0}"),
        "What is the weather in {0} and in {1}?",
    ),
    _ToolKind(
        ("get_time", "time_in", "local_time", "clock"),
        (_CITY,),
        ("What time is it in {0}?", "Tell me the time in {0}", "Time in {0}"),
        "What time is it in {0} and in {1}?",
    ),
    _ToolKind(
        ("find_person", "search_person", "lookup"),
        (_PERSON, _CITY),
        ("Find {0} in {1}", "Who is {0} from {1}?", "Look for {0} in {1}"),
    ),
    _ToolKind(
        ("call_person", "phone_call", "call"),
        (_PERSON,),
        ("Call {0}", "Please call {0}", "Can you call {0} for me?"),
        "Call {0} and {1}",
    ),
    _ToolKind(
        ("set_timer", "timer", "start_timer"),
        (_Argument(("minutes", "duration"), values.between(2, 90), "integer"),),
        ("Set a timer for {0} minutes", "Wake me in {0} minutes"),
        "Set a timer for {0} minutes and one for {1} minutes",
    ),
    _ToolKind(
        ("add", "add_numbers", "sum"),
        (
            _Argument(("a", "left", "first"), values.between(2, 999), "integer"),
            _Argument(("b", "right", "second"), values.between(2, 999), "integer"),
        ),
        ("Add {0} and {1}", "What is {0} plus {1}?", "What is {0} + {1}?"),
    ),
    _ToolKind(
        ("order_item", "order", "buy"),
        (
            _Argument(
                ("count", "number", "quantity"), values.between(2, 99), "integer"
            ),
            _Argument(("item", "product"), values.one_of(values.ITEMS)),
        ),
        ("Order {0} of the {1}", "Buy {0} times the {1}", "I want {0} of the {1}"),
    ),
    _ToolKind(
        ("book_room", "reserve", "book"),
        (
            _Argument(("room", "place"), values.one_of(values.ROOMS)),
            _Argument(("day", "date"), values.one_of(values.DAYS)),
        ),
        ("Book the {0} for {1}", "Reserve the {0} on {1}", "I need the {0} on {1}"),
    ),
    _ToolKind(
        ("play_song", "play", "play_music"),
        (_Argument(("title", "song"), values.title),),
        ("Play {0}", "Please play the song {0}", "I want to hear {0}"),
        "Play {0} and then {1}",
    ),
)


@dataclass(frozen=True)
class Tool:
    """A tool that a request offers: its name, and the types of its arguments."""

    name: str
    arguments: Mapping[str, str]

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the arguments."""
        return {
            "type": "object",
            "properties": {key: {"type": kind} for key, kind in self.arguments.items()},
            "required": list(self.arguments),
        }

    def as_openai(self) -> dict[str, Any]:
        """The tool as the OpenAI API has it in `tools`."""
        return {
            "type": "function",
            "function": {"name": self.name, "parameters": self.schema},
        }


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: Mapping[str, Value]


@dataclass(frozen=True)
class ToolUse:
    """Tools on offer, what the user says, and the calls that answer it: none to two."""

    tools: tuple[Tool, ...]
    request: str
    calls: tuple[Call, ...]


def describe(tools: Sequence[Tool]) -> str:
    """The tools as the chat template writes them: a line for each."""
    return "\n".join(
        f"{tool.name}("
        + ", ".join(f"{key}: {kind}" for key, kind in tool.arguments.items())
        + ")"
        for tool in tools
    )


def calls_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """What vLLM holds the answer to with `tool_choice` "required"."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "enum": [tool.name]},
                "parameters": tool.schema,
            },
            "required": ["name", "parameters"],
        }
        for tool in tools
    ]
    items = {"type": "object", "anyOf": calls}
    return {"type": "array", "minItems": 1, "items": items}


def write_calls(calls: Sequence[Call]) -> str:
    """The calls as the model writes them, which vLLM's parser `hermes` reads."""
    return "\n".join(
        f"{OPEN}"
        + json.dumps(
            {"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False
        )
        + CLOSE
        for call in calls
    )


def draw_tool_use(rng: random.Random, held_out: bool, num_calls: int) -> ToolUse:
    """One to three tools, and a request for `num_calls` of them (0, 1 or 2)."""
    kinds = rng.sample(_KINDS, 4)
    if num_calls == 2:
        kinds.insert(0, rng.choice([kind for kind in _KINDS if kind.doubled]))
        kinds = list(dict.fromkeys(kinds))
    asked = kinds.pop(0)
    offered = kinds[: rng.choice((0, 1, 1, 2))]
    choice = {
        kind: _name_tool(rng, kind)
        for kind in ([*offered, asked] if num_calls else (offered or kinds[:1]))
    }
    tools = list(choice.values())
    rng.shuffle(tools)

    def drawn() -> list[Value]:
        return [argument.draw(rng, held_out) for argument in asked.arguments]

    if num_calls == 2:
        both = [drawn(), drawn()]
        request = asked.doubled.format(both[0][0], both[1][0])
    else:
        both = [drawn()]
        request = rng.choice(asked.requests).format(*both[0])
    if not num_calls:
        return ToolUse(tuple(tools), request, ())
    tool = choice[asked]
    calls = [
        Call(tool.name, dict(zip(tool.arguments, found, strict=True))) for found in both
    ]
    return ToolUse(tuple(tools), request, tuple(calls))


def _name_tool(rng: random.Random, kind: _ToolKind) -> Tool:
    used: dict[str, str] = {}
    for argument in kind.arguments:
        free = [name for name in argument.names if name not in used]
        used[rng.choice(free)] = argument.schema
    return Tool(rng.choice(kind.names), used)
