# SPDX-License-Identifier: Apache-2.0
"""JSON schemas as patterns: what matches is valid, and what cannot be kept is refused.

Texts are drawn from the patterns, and judged by the package `jsonschema`.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from constraints.random_cases import schemas
from constraints.schema_cases import KEPT, PERSON, REFUSED
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from vllm_dlm.constraints.automaton import ConstraintError, compile_pattern
from vllm_dlm.constraints.byte_machine import byte_machine
from vllm_dlm.constraints.limits import DEFAULT, Clock
from vllm_dlm.constraints.schema import schema_pattern
from vllm_dlm.constraints.syntax import parse
from vllm_dlm.constraints.vocabulary import Vocabulary

BYTES = Vocabulary.of_tokens({byte: bytes([byte]) for byte in range(256)}, 257)


def draws(pattern: str, count: int, seed: int = 0) -> list[str]:
    """Texts that match a pattern: random walks that leave sooner or later."""
    automaton = compile_pattern(pattern, BYTES, [256])
    bytes_of: dict[int, list[int]] = {}
    for byte, kind in enumerate(automaton.class_of.tolist()[:256]):
        bytes_of.setdefault(kind, []).append(byte)
    rng = random.Random(seed)
    moves = automaton.transitions.tolist()
    texts = []
    for _ in range(count):
        state, data, patience = 0, bytearray(), rng.choice((0, 5, 30, 90))
        while True:
            ways = [
                (kind, target)
                for kind, target in enumerate(moves[state])
                if target >= 0 and kind != automaton.end_class
            ]
            if len(data) >= patience:
                nearest = automaton.min_length[state] - 1
                ways = [way for way in ways if automaton.min_length[way[1]] == nearest]
            if automaton.accepting[state] and (not ways or rng.random() < 0.3):
                break
            if not ways:
                break
            kind, state = rng.choice(ways)
            data.append(rng.choice(bytes_of[kind]))
        texts.append(data.decode())
    return texts


def check(schema: Any, count: int = 30, whitespace: str | None = None) -> list[Any]:
    """Draw texts of a schema and let `jsonschema` judge them; returns their values."""
    validator = Draft202012Validator(
        schema, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    pattern = schema_pattern(schema, whitespace)
    values = []
    for text in draws(pattern, count):
        value = json.loads(text)
        validator.validate(value)
        values.append(value)
    return values


def matches(schema: Any, value: Any) -> bool:
    """Whether a value's usual spelling matches the schema's pattern."""
    text = json.dumps(value, ensure_ascii=False)
    return re.fullmatch(schema_pattern(schema), text, re.ASCII) is not None


@pytest.mark.parametrize(("schema", "taken", "left_out"), KEPT)
def test_what_matches_is_valid(
    schema: Any, taken: list[Any], left_out: list[Any]
) -> None:
    check(schema)
    for value in taken:
        Draft202012Validator(schema).validate(value)
        assert matches(schema, value), value
    for value in left_out:
        assert not matches(schema, value), value


@pytest.mark.parametrize(("schema", "says"), REFUSED)
def test_what_cannot_be_kept_is_refused(schema: Any, says: str) -> None:
    with pytest.raises(ConstraintError, match=says):
        schema_pattern(schema)


@pytest.mark.parametrize("whitespace", ["", r"[ \n]*", r"\s?", ".?"])
def test_whitespace_is_the_callers(whitespace: str) -> None:
    assert all("name" in value for value in check(PERSON, whitespace=whitespace))
    spelled = draws(schema_pattern({"items": {"const": 1}, "minItems": 3}, ""), 3)
    assert all(" " not in text for text in spelled)


@given(schemas)
@settings(max_examples=25, deadline=None)
def test_random_schemas(schema: Any) -> None:
    """Texts of random schemas are valid; the refusals are ours."""
    try:
        check(schema, 10)
    except ConstraintError as error:
        assert re.search("json schema|too large|no text", str(error))


@pytest.mark.slow
@given(schemas)
@settings(max_examples=300, deadline=None)
def test_many_random_schemas(schema: Any) -> None:
    try:
        check(schema, 20)
    except ConstraintError:
        return


def test_a_schema_of_everything_stays_small() -> None:
    machine = byte_machine(parse(schema_pattern({})), DEFAULT, Clock(DEFAULT))
    assert len(machine.moves) < 1500


def test_closed_objects_have_no_other_keys() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object"}}}
    open_, closed = (schema_pattern(schema, closed=closed) for closed in (False, True))
    text = '{"a": {"b": 1}}'
    assert re.fullmatch(open_, text) and not re.fullmatch(closed, text)
    assert re.fullmatch(closed, '{"a": {}}')
