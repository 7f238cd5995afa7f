# SPDX-License-Identifier: Apache-2.0
"""Structural tags as patterns: how vLLM says which calls of tools a model may write.

A structural tag is a tree of formats: texts, JSON schemas, tags around them, and free
text in which certain words begin a tag. All of these are regular but some grammars, and
but formats of single tokens, which are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_dlm.constraints.grammar import grammar_node
from vllm_dlm.constraints.json_text import Layout
from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.schema import schema_node
from vllm_dlm.constraints.syntax import (
    EMPTY,
    LAST_CODE_POINT,
    Characters,
    Node,
    Repeat,
    characters,
    choice,
    complement,
    concat,
    literal,
    optional,
    parse,
    write,
)

MOST_LETTERS = 256
"""Letters of all words together that a free text must not hold."""
_DEEPEST = 32

_UNSUPPORTED = {
    "token": "single tokens are not supported, only texts",
    "exclude_token": "single tokens are not supported, only texts",
    "any_tokens": "single tokens are not supported, only texts",
    "token_triggered_tags": "triggers that are tokens are not supported, only texts",
    "token_dispatch": "triggers that are tokens are not supported, only texts",
    "qwen_xml_parameter": "arguments in XML are not supported",
}


def structural_pattern(tag: Any, layout: Layout | None = None) -> str:
    """The pattern of a structural tag.

    Args:
        tag: as JSON has it: with `format`, or of the older kind with `structures` and
            `triggers`.
        layout: of JSON inside.

    Raises:
        ConstraintError: it has a format that is not supported.
    """
    layout = layout or Layout()
    if not isinstance(tag, Mapping):
        raise ConstraintError("structural_tag: an object is expected")
    if "structures" in tag:
        tag = {"format": _of_older_kind(tag)}
    return write(_format(tag.get("format"), layout, 0))


def _of_older_kind(tag: Mapping[str, Any]) -> dict[str, Any]:
    tags = [
        {
            "begin": each["begin"],
            "content": {"type": "json_schema", "json_schema": each.get("schema") or {}},
            "end": each["end"],
        }
        for each in tag["structures"]
    ]
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": tags}


def _format(value: Any, layout: Layout, depth: int) -> Node:
    if not isinstance(value, Mapping) or depth > _DEEPEST:
        raise ConstraintError("structural_tag: a format is an object with a type")
    kind = value.get("type")
    if kind in _UNSUPPORTED:
        raise ConstraintError(
            f"structural_tag: {_UNSUPPORTED[kind]} for diffusion language models; use "
            "a tool parser that writes calls as JSON, or regex"
        )
    inner = [
        _format(each, layout, depth + 1)
        for each in (*value.get("elements", ()), *_one(value, "content", kind))
    ]
    if kind == "const_string":
        return literal(value["value"])
    if kind == "json_schema":
        return _schema(value, layout)
    if kind == "any_text":
        _only_default(value, "max_tokens", "max_chars")
        return without(value.get("excludes") or ())
    if kind == "regex":
        return parse(value["pattern"])
    if kind == "grammar":
        return grammar_node(value["grammar"])
    if kind == "sequence":
        return concat(inner)
    if kind == "or":
        return choice(inner)
    if kind == "optional":
        return optional(inner[0])
    if kind in ("star", "plus"):
        return Repeat(inner[0], int(kind == "plus"), None)
    if kind == "repeat":
        most = value["max"]
        return Repeat(inner[0], value["min"], None if most < 0 else most)
    if kind == "tag":
        return _tag(value, layout, depth)
    if kind == "tags_with_separator":
        return _separated(value, layout, depth)
    if kind == "triggered_tags":
        return _triggered(value, layout, depth)
    raise ConstraintError(f"structural_tag: format {kind!r} is not supported")


def _one(value: Mapping[str, Any], name: str, kind: Any) -> Sequence[Any]:
    return (value[name],) if kind != "tag" and name in value else ()


def _only_default(value: Mapping[str, Any], *names: str) -> None:
    """Refuse what a format asks for and would be dropped."""
    for name in names:
        if value.get(name):
            raise ConstraintError(
                f"structural_tag: {name} of {value['type']} is not supported"
            )


def _schema(value: Mapping[str, Any], layout: Layout) -> Node:
    _only_default(value, "any_order", "excludes")
    style = value.get("style") or "json"
    if style != "json":
        raise ConstraintError(
            f"structural_tag: arguments in the style {style!r} are not supported for "
            "diffusion language models; use a tool parser that writes calls as JSON "
            "(hermes, llama3_json, ...)"
        )
    schema = value["json_schema"]
    # Of tools that are not strict, vLLM says that anything goes: arguments of a call
    # are an object all the same.
    return schema_node({"type": "object"} if schema is True else schema, layout)


def _tag(value: Mapping[str, Any], layout: Layout, depth: int) -> Node:
    begin, end = value["begin"], value["end"]
    ends = [end] if isinstance(end, str) else end
    if not isinstance(begin, str) or not isinstance(ends, list):
        raise ConstraintError(
            "structural_tag: tags that begin or end with a token are not supported "
            "for diffusion language models, only with texts"
        )
    content = value["content"]
    if content.get("type") == "any_text":
        # The text goes on until the tag ends.
        content = {**content, "excludes": [*(content.get("excludes") or ()), *ends]}
    inside = _format(content, layout, depth + 1)
    return concat([literal(begin), inside, choice(map(literal, ends))])


def _tags(value: Mapping[str, Any], layout: Layout, depth: int) -> Node:
    tags = value["tags"]
    if not tags:
        raise ConstraintError(f"structural_tag: {value['type']} without tags")
    return choice(_tag(each, layout, depth + 1) for each in tags)


def _separated(value: Mapping[str, Any], layout: Layout, depth: int) -> Node:
    tag = _tags(value, layout, depth)
    some = tag
    if not value.get("stop_after_first"):
        more = concat([literal(value["separator"]), tag])
        some = concat([tag, Repeat(more, 0, None)])
    return some if value.get("at_least_one") else optional(some)


def _triggered(value: Mapping[str, Any], layout: Layout, depth: int) -> Node:
    triggers = value["triggers"]
    for tag in value["tags"]:
        if not any(str(tag["begin"]).startswith(each) for each in triggers):
            raise ConstraintError(
                f"structural_tag: no trigger begins the tag {tag['begin']!r}"
            )
    tag = _tags(value, layout, depth)
    free = without([*triggers, *(value.get("excludes") or ())])
    if value.get("stop_after_first"):
        return tag if value.get("at_least_one") else concat([free, optional(tag)])
    if value.get("at_least_one"):
        return concat([tag, free, Repeat(concat([tag, free]), 0, None)])
    return concat([free, Repeat(concat([tag, free]), 0, None)])


def without(words: Sequence[str]) -> Node:
    """Any text that holds none of the words.

    A machine knows the longest beginning of a word that the text ends with. Its states
    are taken out one by one, the longest first, until only the empty one is left.

    Raises:
        ConstraintError: the words are very long, or one is empty.
    """
    if not words:
        return Repeat(Characters(((0, LAST_CODE_POINT),)), 0, None)
    if not all(words) or sum(map(len, words)) > MOST_LETTERS:
        raise ConstraintError(
            f"structural_tag: words that a text must not hold have 1 to {MOST_LETTERS} "
            "letters in all"
        )
    states = sorted({word[:i] for word in words for i in range(len(word))}, key=len)
    letters = sorted({letter for word in words for letter in word})
    edges: dict[tuple[str, str], Node] = {}
    for state in states:
        targets: dict[str, list[tuple[int, int]]] = {}
        for letter in letters:
            text = state + letter
            if not any(text.endswith(word) for word in words):
                target = next(
                    text[i:] for i in range(len(text) + 1) if text[i:] in states
                )
                targets.setdefault(target, []).append((ord(letter),) * 2)
        known = characters((ord(letter),) * 2 for letter in letters)
        targets.setdefault("", []).extend(complement(known.ranges))
        for target, ranges in targets.items():
            edges[state, target] = characters(ranges)
    ends: dict[str, Node] = dict.fromkeys(states, EMPTY)
    for gone in reversed(states[1:]):
        loop = edges.pop((gone, gone), None)
        around = [Repeat(loop, 0, None)] if loop is not None else []
        away = {to: node for (at, to), node in edges.items() if at == gone}
        for at in [at for at, to in edges if to == gone]:
            into = concat([edges.pop((at, gone)), *around])
            for to, node in away.items():
                ways = [edges[at, to]] if (at, to) in edges else []
                edges[at, to] = choice([*ways, concat([into, node])])
            ends[at] = choice([ends[at], concat([into, ends[gone]])])
        edges = {pair: node for pair, node in edges.items() if pair[0] != gone}
    return concat([Repeat(edges["", ""], 0, None), ends[""]])
