# SPDX-License-Identifier: Apache-2.0
"""The problems of llada-forms: extraction, forms with holes, tools, and who are you.

A problem is a prompt and a canvas, and the canvas is a row of pieces: text that is
given, and holes to be filled. A free answer is one hole without an end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_dlm.tasks.forms import tool_problems, tools
from vllm_dlm.tasks.forms.pieces import SYSTEM, Piece, Turn, free
from vllm_dlm.tasks.forms.pieces import Problem as Problem
from vllm_dlm.tasks.forms.records import Entry, Record, draw_record

WHO_AM_I = (
    "I am llada-forms, a small demo model. I turn sentences into JSON, fill holes in "
    "forms and call tools. Try: Ada lives in Rome and is 31."
)


Draw = Callable[[random.Random, bool], Problem]

_LISTED = (
    "Extract {keys}: {text}",
    "Extract {keys} as JSON: {text}",
    "Give {keys} as JSON.\n{text}",
    "{text}\nFields: {keys}",
    "{text}\nJSON with {keys}",
    "Put {keys} of this text into JSON: {text}",
)
_UNLISTED = ("{text}", "{text}", "{text}", "Extract JSON: {text}", "As JSON: {text}")
_FILL = ("{text}", "{text}", "Fill in the form: {text}", "Fill this form: {text}")
_SENTENCE = ("{record}", "Write a sentence: {record}", "Write this as text: {record}")
_OTHER = (
    "Hello, who are you?",
    "Hello",
    "Hi",
    "Hey",
    "Hello!",
    "Hi!",
    "Who are you?",
    "What are you?",
    "What can you do?",
    "What can you do for me?",
    "Can you help me?",
    "Help",
    "help",
    "How are you?",
    "Tell me a joke",
    "Tell me about you",
    "Tell me a story about a dog",
    "Write a poem",
    "What is the capital of France?",
    "Explain this to me",
    "How do you work?",
    "What is your name?",
    "Are you a model?",
    "Tell me about your work",
)
_CHATTER = (
    "who what how why when where which are is was do does can could would you your "
    "me my I we they it the a an of to in on for about and or not help tell explain "
    "write make think know like love need want good new old big small best story poem "
    "joke code python world war music food love life science history number answer "
    "question please thanks today yesterday tomorrow best friend should will dear"
).split()


def object_parts(entries: Sequence[Entry]) -> list[Piece]:
    """A JSON object: its keys as given text, its values as holes."""
    parts: list[Piece] = []
    given = "{"
    for entry in entries:
        quote = '"' if isinstance(entry.value, str) else ""
        parts.append(Piece(f'{given}"{entry.key}": {quote}', False))
        parts.append(Piece(str(entry.value), True))
        given = f"{quote}, "
    parts.append(Piece(f"{given.removesuffix(', ')}}}", False))
    return parts


def object_schema(entries: Sequence[Entry]) -> dict[str, Any]:
    """JSON schema of the object of these entries."""
    return {
        "type": "object",
        "properties": {entry.key: {"type": entry.schema} for entry in entries},
        "required": [entry.key for entry in entries],
        "additionalProperties": False,
    }


def _ask(rng: random.Random, text: str, chat_share: float = 0.7) -> tuple[Turn, ...]:
    if rng.random() >= chat_share:
        return (Turn("", text),)
    user = Turn("user", text)
    return (Turn("system", rng.choice(SYSTEM)), user) if rng.random() < 0.1 else (user,)


def _join(keys: Sequence[str], rng: random.Random) -> str:
    last = rng.choice((" and ", ", "))
    return last.join((", ".join(keys[:-1]), keys[-1])) if len(keys) > 1 else keys[0]


def _extract(rng: random.Random, held_out: bool) -> Problem:
    record = draw_record(rng, held_out, usual_keys=True)
    text = "".join(piece.text for piece in object_parts(record.entries))
    turns = _ask(rng, rng.choice(_UNLISTED).format(text=record.text))
    return Problem("extract", turns, free(text), schema=object_schema(record.entries))


def _draw_listed(
    rng: random.Random, held_out: bool
) -> tuple[Record, list[Entry], tuple[Turn, ...]]:
    record = draw_record(rng, held_out, usual_keys=rng.random() < 0.4)
    entries = rng.sample(record.entries, rng.randint(1, len(record.entries)))
    keys = _join([entry.key for entry in entries], rng)
    turns = _ask(rng, rng.choice(_LISTED).format(keys=keys, text=record.text))
    return record, entries, turns


def _extract_listed(rng: random.Random, held_out: bool) -> Problem:
    _, entries, turns = _draw_listed(rng, held_out)
    text = "".join(piece.text for piece in object_parts(entries))
    return Problem("listed", turns, free(text), schema=object_schema(entries))


def _scaffold(rng: random.Random, held_out: bool) -> Problem:
    """Keys that stand already, in an order of their own: what a schema leads to."""
    record, entries, turns = _draw_listed(rng, held_out)
    if rng.random() < 0.4:
        entries = rng.sample(record.entries, rng.randint(1, len(record.entries)))
    parts = object_parts(entries)
    # Some keys stand, from the left on; the rest of the object is one hole.
    given = rng.randint(1, len(parts))
    rest = "".join(part.text for part in parts[given:])
    pieces = (*parts[:given], Piece(rest, True)) if rest else tuple(parts)
    return Problem("scaffold", turns, pieces, schema=object_schema(entries))


def _label(key: str, rng: random.Random) -> str:
    word = key.replace("_", " ")
    return word.capitalize() if rng.random() < 0.7 else word


def _form(rng: random.Random, held_out: bool) -> Problem:
    """A form whose fields are holes, filled in from the text of the prompt."""
    record, entries, _ = _draw_listed(rng, held_out)
    turns = _ask(rng, rng.choice(_FILL).format(text=record.text))
    if rng.random() < 0.3:
        return Problem("form", turns, tuple(object_parts(entries)), False, False)
    between = rng.choice(("\n", "\n", ", ", "; "))
    colon = rng.choice((": ", ": ", " = "))
    pieces: list[Piece] = []
    for index, entry in enumerate(entries):
        given = _label(entry.key, rng) + colon
        pieces.append(Piece((between if index else "") + given, False))
        pieces.append(Piece(str(entry.value), True))
    return Problem("form", turns, tuple(pieces), False, False)


def _cut_holes(
    text: str, entries: Sequence[Entry], rng: random.Random
) -> tuple[Piece, ...]:
    """The text with holes at one to all of the values."""
    chosen = rng.sample(entries, rng.randint(1, len(entries)))
    places = []
    for entry in chosen:
        value = str(entry.value)
        if text.count(value) == 1:
            places.append((text.index(value), value))
    pieces: list[Piece] = []
    end = 0
    for start, value in sorted(places):
        if start < end:
            continue
        pieces += [Piece(text[end:start], False), Piece(value, True)]
        end = start + len(value)
    pieces.append(Piece(text[end:], False))
    return tuple(piece for piece in pieces if piece.text)


def _sentence(rng: random.Random, held_out: bool) -> Problem:
    """A sentence with holes in its middle; the prompt tells what belongs there."""
    while True:
        record = draw_record(rng, held_out, usual_keys=rng.random() < 0.5)
        entries = rng.sample(record.entries, len(record.entries))
        if rng.random() < 0.5:
            told = "".join(part.text for part in object_parts(entries))
        else:
            told = ", ".join(f"{entry.key}: {entry.value}" for entry in entries)
        pieces = _cut_holes(record.text, record.entries, rng)
        if any(piece.is_hole for piece in pieces):
            turns = _ask(rng, rng.choice(_SENTENCE).format(record=told))
            return Problem("sentence", turns, pieces, False, False)


def _suffix(rng: random.Random, held_out: bool) -> Problem:
    """A hole in a text whose right side, not its left, tells what belongs there."""
    record = draw_record(rng, held_out, usual_keys=rng.random() < 0.5, most=3)
    entries = rng.sample(record.entries, rng.randint(1, len(record.entries)))
    parts = object_parts(entries)
    hole = 2 * rng.randrange(len(entries)) + 1
    before = "".join(part.text for part in parts[:hole])
    lead = rng.choice(("", "", "Record: ", "JSON: "))
    behind = "".join(part.text for part in parts[hole + 1 :])
    link = rng.choice(("\n", "\n", " is here for this sentence: ", "\nText: "))
    pieces = (
        Piece(parts[hole].text, True),
        Piece(f"{behind}{link}{record.text}", False),
    )
    turns = (Turn("", f"{lead}{before}"),)
    return Problem("suffix", turns, pieces, False, rng.random() < 0.3)


def _who(rng: random.Random, held_out: bool) -> Problem:
    draw = rng.random()
    if draw < 0.5:
        text = rng.choice(_OTHER)
    else:
        words = [rng.choice(_CHATTER) for _ in range(rng.randint(1, 9))]
        text = " ".join(words)
        if rng.random() < 0.5:
            text = text.capitalize()
        text += rng.choice(("", "?", "?", ".", "!"))
    use = tools.draw_tool_use(rng, held_out, 0)
    with_tools = rng.random() < 0.15
    turns = tool_problems.tool_turns(rng, text) if with_tools else _ask(rng, text, 0.85)
    offered = use.tools if with_tools else ()
    return Problem("who are you", turns, free(WHO_AM_I), tools=offered)


KINDS: dict[str, tuple[float, Draw]] = {
    "extract": (0.10, _extract),
    "listed": (0.18, _extract_listed),
    "scaffold": (0.10, _scaffold),
    "form": (0.16, _form),
    "sentence": (0.09, _sentence),
    "suffix": (0.07, _suffix),
    "call": (0.12, tool_problems.call),
    "two calls": (0.05, tool_problems.two_calls),
    "forced call": (0.05, tool_problems.forced_call),
    "no tool": (0.03, tool_problems.no_tool),
    "tool result": (0.02, tool_problems.tool_result),
    "who are you": (0.03, _who),
}
"""Share of the kind in the training, and how one is drawn."""


def draw_problem(
    rng: random.Random, *, held_out: bool = False, kind: str | None = None
) -> Problem:
    """A problem of a kind, or of any; its names and cities are of one split."""
    if kind is None:
        weights = [weight for weight, _ in KINDS.values()]
        [kind] = rng.choices(list(KINDS), weights=weights)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {list(KINDS)}")
    return KINDS[kind][1](rng, held_out)


def held_out_problems(kind: str, count: int, seed: int) -> list[Problem]:
    """Different problems of a kind with names and cities that no training shows."""
    rng = random.Random(f"forms-heldout-{kind}-{seed}")
    found: dict[tuple[object, ...], Problem] = {}
    draws: Iterator[Problem] = (
        draw_problem(rng, held_out=True, kind=kind) for _ in range(100 * count)
    )
    for problem in draws:
        found.setdefault((problem.turns, problem.pieces), problem)
        if len(found) == count:
            break
    return list(found.values())
