# SPDX-License-Identifier: Apache-2.0
"""Random regular expressions and JSON schemas, for hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

pieces = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", "c", "ab", "a|bc", ""])
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(
            inner,
            st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{2,}", "{,2}"]),
        ).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=8,
)


simple = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "string", "maxLength": 3},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["x", 1, None]},
        {"const": [1]},
        {"type": "number", "minimum": -1.5, "maximum": 20},
        {"type": "integer", "exclusiveMinimum": 9, "maximum": 1234},
        {"type": "string", "format": "date"},
        {"type": "string", "pattern": "a[^b]?"},
        True,
    ]
)


def _objects(inner: Any) -> Any:
    return st.builds(
        lambda values, required, closed: {
            "type": "object",
            "properties": values,
            "required": [key for key in values if key in required],
            **({"additionalProperties": False} if closed else {}),
        },
        st.dictionaries(st.sampled_from(["a", "b", "c", 'd"é']), inner, max_size=4),
        st.sets(st.sampled_from(["a", "b", "c"])),
        st.booleans(),
    )


def _arrays(inner: Any) -> Any:
    return st.builds(
        lambda items, least, more: {
            "type": "array",
            "items": items,
            "minItems": least,
            "maxItems": least + more,
        },
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )


schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda all_: {"anyOf": all_}),
        st.lists(inner, min_size=1, max_size=2).map(lambda all_: {"allOf": all_}),
        st.lists(inner, min_size=1, max_size=2).map(lambda all_: {"oneOf": all_}),
    ),
    max_leaves=5,
)
