# SPDX-License-Identifier: Apache-2.0
"""Bodies for every route of a server, right and wrong, as hypothesis strategies.

They are made of the server's own `/openapi.json`, so a route or a field that is new in
vLLM is asked without a change here, and of all our options: a body begins with what its
route requires, and some further fields hold what their schema allows, or anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from vllm_dlm.config.cache import POLICIES
from vllm_dlm.config.canvas import CANVAS_OPTIONS
from vllm_dlm.config.growth import GROWTHS
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import parameter_names

Schema = Mapping[str, Any]
Bodies = st.SearchStrategy[Any]

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ALWAYS = ("model", "prompt", *LENGTHS[::2], "sampling_params")
"""Fields that every body has where its schema knows them: without a length, a text is
as long as the context."""

DEEPEST = 3
"""Levels of a schema that are followed; below, only what is required is set."""

TEXTS = (
    *("", "a", "Copy [Ada, Ben]", "Sort [Eva, Dan, Ada]", "\x00", "\ud800", "é" * 40),
    *("auto", "none", "null", "true", "-1", "1e400", "{", "[]", '{"type": "object"}'),
    *("{{3}} and {{name:2}}", "<|mask|>", "[a-c]{2}", "((((", "x" * 3000),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 16, 0.5, 0.9, 1.0, -0.5, 2.5, 1e-9, 1e300, 128, 255),
    *(1025, 2**31, 2**31 - 1, 2**63, -(2**63) - 1, 2**64, 10**400),
)

JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(TEXTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(TEXTS[:6]), inner, max_size=3)
    ),
    max_leaves=5,
)
"""Anything."""

_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(("user", "user", "assistant", "system", "tool", "")),
        "content": st.sampled_from(TEXTS) | JSON,
    },
    optional={"name": st.sampled_from(TEXTS), "tool_calls": JSON},
)
_question = st.fixed_dictionaries(
    {"role": st.just("user"), "content": st.sampled_from(TEXTS[1:4])}
)
_right_ids = st.lists(st.sampled_from((5, 6, 17, 30)), min_size=1, max_size=5)
_ids = st.lists(st.sampled_from((0, 5, 6, 17, 127, 128, -1, 2**31)), max_size=5)
_schema_of_json = st.sampled_from(
    (
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        {"type": "string", "pattern": "[a-c]{2}"},
        {"enum": ["Ada", "Ben"]},
        {"$ref": "#"},
        {"type": "array", "items": {"$ref": "#/nowhere"}},
        {"anyOf": []},
        {"not": {}},
    )
)
_structured = st.fixed_dictionaries(
    {},
    optional={
        "regex": st.sampled_from(TEXTS),
        "choice": st.lists(st.sampled_from(TEXTS), max_size=3),
        "json": _schema_of_json | JSON,
        "json_object": st.booleans(),
        "grammar": st.sampled_from(TEXTS),
        "structural_tag": st.sampled_from(TEXTS),
        "whitespace_pattern": st.sampled_from(TEXTS),
    },
)

RIGHT: dict[str, Bodies] = {
    "model": st.just("llada-tiny"),
    "prompt": st.sampled_from(TEXTS[1:4]) | _right_ids | st.just(list(TEXTS[1:4])),
    "messages": st.lists(_question, min_size=1, max_size=3),
    "input": st.sampled_from(TEXTS[1:4]),
    "token_ids": _right_ids,
    "tokens": _right_ids,
    "max_tokens": st.sampled_from((1, 2, 8, 16, 24)),
    "max_completion_tokens": st.sampled_from((1, 8, 16)),
    "max_output_tokens": st.sampled_from((1, 8, 16)),
    "n": st.sampled_from((1, 1, 2, 3)),
    "temperature": st.sampled_from((0, 0, 0.7, 1)),
    "stop": st.sampled_from(TEXTS[1:4]),
    "stop_token_ids": _right_ids,
    "allowed_token_ids": _right_ids,
    "bad_words": st.lists(st.sampled_from(TEXTS[1:4]), max_size=3),
    "logit_bias": st.dictionaries(
        st.sampled_from(("5", "17")), st.sampled_from((-100, -1, 0.5, 100))
    ),
    "structured_outputs": st.sampled_from(
        ({"regex": "[A-C][a-c]{2}"}, {"choice": ["Ada", "Ben"]})
    ),
}
"""Field -> what is worth sending and mostly accepted; else its schema says."""

WRONG: dict[str, Bodies] = {
    "prompt": _ids | st.lists(_ids, max_size=2),
    "messages": st.lists(_message, max_size=3),
    "token_ids": _ids,
    "tokens": _ids,
    # What multiplies work is small, or far beyond what is accepted.
    "max_tokens": st.sampled_from((0, -1, 5000, 2**31)),
    "max_completion_tokens": st.sampled_from((0, -1, 5000)),
    "max_output_tokens": st.sampled_from((0, -1, 5000)),
    "n": st.sampled_from((0, -1, 2**31)),
    "temperature": st.sampled_from((-1, 1e300)),
    "stop": st.sampled_from(TEXTS) | st.lists(st.sampled_from(TEXTS), max_size=3),
    "stop_token_ids": _ids,
    "allowed_token_ids": _ids,
    "bad_words": st.lists(st.sampled_from(TEXTS), max_size=3),
    "logit_bias": st.dictionaries(
        st.sampled_from(("5", "127", "128", "-1", "a")), st.sampled_from(NUMBERS)
    ),
    "structured_outputs": _structured,
    "response_format": st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                ("text", "json_object", "json_schema", "structural_tag", "regex", "")
            )
        },
        optional={
            "json_schema": st.fixed_dictionaries(
                {"name": st.sampled_from(TEXTS)}, optional={"schema": _schema_of_json}
            )
        },
    ),
}
"""Field -> what is nearly right, beside anything."""

FORMS = ("flat", "json", "flat", "object", "any")

FITTING: dict[str, Bodies] = {
    "strategy": st.sampled_from(tuple(STRATEGIES)),
    "cache": st.sampled_from(tuple(POLICIES)),
    "growth": st.sampled_from(tuple(GROWTHS)),
    "block_length": st.sampled_from((8, 16, 32, "canvas")),
    "eotp": st.sampled_from(("off", "block", "token", "canvas")),
    "frames": st.sampled_from(("off", "writes", "text")),
    "holes": st.sampled_from(("exact", "shrink", "elastic")),
    "canvas": st.lists(st.sampled_from((5, 6, 125, 126, 127)), max_size=9),
    "canvas_text": st.sampled_from(("{{3}} and {{name:2}}", "[Ada, {{4}}]")),
    "steps": st.sampled_from((1, 2, 8)),
    "steps_per_block": st.sampled_from((1, 2, 8)),
}
"""Our options -> values that are right with some of the others."""


def _option_values(name: str, *, wild: bool) -> Bodies:
    """Values of one of our options, or of a strategy's parameter."""
    fitting = FITTING.get(name, st.sampled_from((1, 2, 0.5, 0.9, True, 8)))
    return st.sampled_from(NUMBERS) | JSON | fitting if wild else fitting


_PARAMETERS = sorted(
    {
        *DlmConfig.model_fields,
        *CANVAS_OPTIONS,
        *(n for name in STRATEGIES for n in parameter_names(STRATEGIES[name].Params)),
        *(n for policy in POLICIES.values() for n in policy.model_fields),
        *(n for policy in GROWTHS.values() for n in policy.model_fields),
    }
)


@st.composite
def options(draw: st.DrawFn, *, wild: bool) -> Any:
    """What `vllm_xargs` or `extra_args` hold: options flat, in JSON, or neither."""
    frequent = ("strategy", "cache", "block_length", "canvas_text", "eotp", "growth")
    names = draw(
        st.lists(st.sampled_from(frequent), max_size=2, unique=True)
        | st.lists(st.sampled_from(_PARAMETERS), max_size=2, unique=True)
    )
    chosen = {name: draw(_option_values(name, wild=wild)) for name in names}
    strategy = chosen.get("strategy")
    if strategy in tuple(STRATEGIES):
        own = sorted(parameter_names(STRATEGIES[strategy].Params))
        for name in draw(st.lists(st.sampled_from(own), max_size=2)) if own else ():
            chosen[name] = draw(_option_values(name, wild=wild))
    form = draw(st.sampled_from(FORMS if wild else FORMS[:2]))
    if form == "flat":
        return {f"dlm_{name}": value for name, value in chosen.items()}
    if form == "any":
        return draw(JSON)
    return {"dlm": json.dumps(chosen) if form == "json" else chosen}


@dataclass(frozen=True)
class Call:
    """One method of a path."""

    method: str
    path: str
    body: Schema | None
    """JSON schema of its body; None if it takes none."""
    names: tuple[str, ...]
    """Parameters in the path and the query."""
    required: frozenset[str]


def calls_of(openapi: Schema) -> list[Call]:
    """All methods of all paths of a server."""
    found = []
    for path, methods in openapi["paths"].items():
        for method, about in methods.items():
            content = about.get("requestBody", {}).get("content", {})
            body = content.get("application/json", {}).get("schema")
            if body is None and content:
                body = next(iter(content.values())).get("schema")
            given = about.get("parameters", ())
            found.append(
                Call(
                    method.upper(),
                    path,
                    body,
                    tuple(one["name"] for one in given),
                    frozenset(one["name"] for one in given if one.get("required")),
                )
            )
    return found


@st.composite
def _objects(draw: st.DrawFn, maker: Maker, schema: Schema) -> Any:
    """Bodies that are objects: what is required, and some fields more."""
    alternatives = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if alternatives:
        schema = maker.resolved(draw(st.sampled_from(alternatives)))
    fields = dict(schema.get("properties", {}))
    # Of those that are right everywhere else, more reach the engine.
    wild = draw(st.booleans())

    def value(name: str) -> Any:
        if wild and draw(st.integers(0, 3)) == 0:
            wrong = WRONG.get(name, JSON)
            return draw(wrong if name in LENGTHS else wrong | JSON)
        return draw(maker.values(name, fields.get(name, {}), 0))

    names = [*schema.get("required", ()), *(n for n in ALWAYS if n in fields)]
    if "input" in names:  # /v1/responses has another "prompt"
        names.remove("prompt")
    most = 4 if wild else 2
    further = st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True)
    names += draw(further) if fields else ()
    body = {name: value(name) for name in dict.fromkeys(names)}
    if "stream" in fields and draw(st.integers(0, 3)) == 0:
        body["stream"] = True
    if fields and draw(st.booleans()):
        body["vllm_xargs"] = draw(options(wild=wild))
    if wild and draw(st.integers(0, 4)) == 0:
        body[draw(st.sampled_from((*_PARAMETERS, *TEXTS[:8])))] = draw(JSON)
    if wild and body and draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(body)))
        if name not in (*LENGTHS, "sampling_params"):
            del body[name]
    return body


class Maker:
    """Makes bodies that a server's schema describes.

    Args:
        openapi: the server's `/openapi.json`.
    """

    def __init__(self, openapi: Schema) -> None:
        self._schemas = openapi.get("components", {}).get("schemas", {})

    def bodies(self, schema: Schema) -> Bodies:
        """Bodies of one route."""
        return self._body(self.resolved(schema))

    def resolved(self, schema: Schema) -> Schema:
        """A schema, or the one that it refers to."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def _body(self, schema: Schema) -> Bodies:
        whole = _objects(self, schema)
        # Now and then nothing of the kind.
        return st.integers(0, 19).flatmap(lambda n: whole if n else JSON)

    def values(self, name: str, schema: Schema, depth: int) -> Bodies:
        """Values of a field that its schema allows, as far as that says."""
        if name == "messages" and "items" in schema.get("items", {}):
            return st.lists(RIGHT[name], min_size=1, max_size=2)  # a batch of chats
        if name in RIGHT:
            return RIGHT[name]
        if name == "sampling_params":
            return self._sampling()
        if name in ("vllm_xargs", "extra_args"):
            return options(wild=False) | options(wild=True)
        schema = self.resolved(schema)
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        for key in ("anyOf", "oneOf", "allOf"):
            if schema.get(key):
                if depth > DEEPEST:
                    return JSON
                return st.one_of(*(self.values("", s, depth) for s in schema[key]))
        kind = schema.get("type")
        if kind == "array":
            if depth > DEEPEST:
                return st.just([])
            inner = self.values("", schema.get("items", {}), depth + 1)
            return st.lists(inner, min_size=schema.get("minItems", 0), max_size=3)
        if kind == "object":
            return self._object(schema, depth)
        if kind in ("integer", "number"):
            least = schema.get("minimum", -(2**65))
            most = schema.get("maximum", 2**65)
            fitting = [n for n in NUMBERS if least <= n <= most]
            if kind == "integer":
                fitting = [n for n in fitting if n == int(n)]
            return st.sampled_from(fitting or NUMBERS)
        if kind == "string":
            return st.sampled_from(TEXTS)
        if kind == "boolean":
            return st.booleans()
        if kind == "null":
            return st.none()
        return JSON

    def _sampling(self) -> Bodies:
        """Sampling parameters of `/inference/v1/generate`, whose schema names none."""
        names = ("n", "temperature", "stop", "stop_token_ids", "allowed_token_ids")
        names += ("bad_words", "logit_bias", "structured_outputs", "extra_args", "seed")
        names += ("min_tokens", "top_k", "logprobs", "ignore_eos", "nothing")
        return st.fixed_dictionaries(
            {"max_tokens": RIGHT["max_tokens"]},
            optional={
                name: self.values(name, {}, 0) | WRONG.get(name, JSON) for name in names
            },
        )

    def _object(self, schema: Schema, depth: int) -> Bodies:
        fields = schema.get("properties", {})
        if not fields:
            return st.dictionaries(st.sampled_from(TEXTS[:5]), JSON, max_size=2)
        required = schema.get("required", ())
        made = {name: self.values(name, fields[name], depth + 1) for name in required}
        optional = {}
        if depth <= DEEPEST:
            optional = {
                name: self.values(name, inner, depth + 1)
                for name, inner in fields.items()
                if name not in made
            }
        return st.fixed_dictionaries(made, optional=optional)
