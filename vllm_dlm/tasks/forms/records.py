# SPDX-License-Identifier: Apache-2.0
"""Records and the sentences that tell them: five kinds of things with their fields."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm_dlm.tasks.forms import values

Value = str | int | float


@dataclass(frozen=True)
class Field:
    """A field of a record.

    Args:
        keys: Names that a form may give the field, the usual one first.
        phrases: How a sentence tells the field, with `{}` for the value.
        draw: A value, of the training's words or of those held out.
        schema: Type of the value in a JSON schema.
    """

    keys: tuple[str, ...]
    phrases: tuple[str, ...]
    draw: Callable[[random.Random, bool], Value]
    schema: str = "string"


@dataclass(frozen=True)
class Entry:
    """A field of one record, under the key that its form uses."""

    key: str
    value: Value
    schema: str


@dataclass(frozen=True)
class Record:
    """A text and what it says, in the order in which it says so."""

    text: str
    entries: tuple[Entry, ...]


# The first field opens the sentence; the phrases of the others follow in any order.
_KINDS: tuple[tuple[Field, ...], ...] = (
    (
        Field(
            ("name", "name", "person", "first_name", "full_name"),
            ("{}",),
            values.name,
        ),
        Field(
            ("city", "city", "town", "home", "place"),
            ("lives in {}", "is from {}", "comes from {}", "moved to {}"),
            values.city,
        ),
        Field(
            ("age", "age", "years"),
            ("is {}", "is {} years old", "turned {}"),
            values.between(2, 99),
            "integer",
        ),
        Field(
            ("job", "job", "work", "profession"),
            ("works as a {}", "is a {}"),
            values.one_of(values.JOBS),
        ),
    ),
    (
        Field(("name", "pet", "pet_name"), ("{}",), values.first_name),
        Field(
            ("kind", "animal", "species"),
            ("is a {}",),
            values.one_of(values.PETS),
        ),
        Field(
            ("owner", "owner_name"),
            ("belongs to {}", "lives with {}"),
            values.first_name,
        ),
        Field(
            ("age", "years"),
            ("is {} years old", "is {}"),
            values.between(2, 19),
            "integer",
        ),
    ),
    (
        Field(
            ("item", "product", "thing"),
            ("The {}", "This {}", "A {}", "Our {}"),
            values.one_of(values.ITEMS),
        ),
        Field(
            ("price", "cost"),
            ("costs {}", "sells for {}"),
            values.price,
            "number",
        ),
        Field(("color", "colour"), ("is {}",), values.one_of(values.COLORS)),
        Field(
            ("seller", "shop", "store"),
            ("is sold by {}", "comes from {}"),
            values.city,
        ),
        Field(
            ("stock", "count", "number"),
            ("is there {} times", "was sold {} times"),
            values.between(2, 300),
            "integer",
        ),
    ),
    (
        Field(("host", "guest", "who"), ("{}",), values.name),
        Field(
            ("day", "date"),
            ("comes on {}", "meets us on {}"),
            values.one_of(values.DAYS),
        ),
        Field(
            ("time", "start", "hour"), ("starts at {}", "arrives at {}"), values.clock
        ),
        Field(
            ("room", "place", "where"),
            ("waits in the {}", "sits in the {}"),
            values.one_of(values.ROOMS),
        ),
        Field(
            ("people", "guests", "count"),
            ("brings {} people", "brings {} guests"),
            values.between(2, 40),
            "integer",
        ),
    ),
    (
        Field(("title", "book", "name"), ('"{}"', "The book {}"), values.title),
        Field(("author", "writer"), ("was written by {}", "is by {}"), values.name),
        Field(
            ("year", "published"),
            ("was printed in {}", "is from {}"),
            values.between(1900, 2029),
            "integer",
        ),
        Field(
            ("pages", "length"),
            ("has {} pages",),
            values.between(40, 900),
            "integer",
        ),
    ),
)


def draw_record(
    rng: random.Random, held_out: bool, *, usual_keys: bool, most: int = 4
) -> Record:
    """A record of one of the kinds, with two to `most` of its fields.

    Args:
        rng: Source of randomness.
        held_out: Take names and cities that are kept for evaluation, else none of them.
        usual_keys: Give each field its usual key, else any of its keys.
        most: Most fields.
    """
    kind = rng.choice((_KINDS[0], *_KINDS))
    head, *others = kind
    rest = rng.sample(others, min(len(others), rng.randint(1, most - 1)))
    entries: list[Entry] = []
    phrases: list[str] = []
    for field in (head, *rest):
        used = {entry.key for entry in entries}
        free = [key for key in field.keys if key not in used]
        key = free[0] if usual_keys else rng.choice(free)
        value = field.draw(rng, held_out)
        entries.append(Entry(key, value, field.schema))
        phrases.append(rng.choice(field.phrases).format(value))
    subject, *verbs = phrases
    told = verbs[0]
    for phrase in verbs[1:-1]:
        told += f", {phrase}"
    if len(verbs) > 1:
        told += rng.choice((" and ", " and ", ", ")) + verbs[-1]
    end = rng.choice((".", ".", ""))
    return Record(f"{subject} {told}{end}", tuple(entries))
