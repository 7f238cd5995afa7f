# SPDX-License-Identifier: Apache-2.0
"""Regular grammars as patterns: the same texts as by hand, and as xgrammar takes."""

from __future__ import annotations

import re
from itertools import product

import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from vllm_dlm.constraints.grammar import grammar_node
from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.syntax import parse, write

LIST = """
# A list of numbers and words; comments and line breaks mean nothing.
root ::= "[" items? "]"
items ::= item | items ", " item   # left recursion
item ::= number | word
number ::= "-"? [1-9] [0-9]{0,2}
word ::= [a-c] word | [a-c]        # right recursion
"""


def pattern(text: str) -> str:
    return write(grammar_node(text))


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (
            LIST,
            ["[]", "[ab]", "[-12, c, 7]", "[aaaa]"],
            ["[", "[, a]", "[1234]", "[0]"],
        ),
        ('root ::= "a"* "b"+ "c"?', ["b", "aabbc"], ["a", "ca"]),
        ('root ::= ("x" | "y"){2,3}', ["xy", "yyy"], ["x", "xyxy"]),
        ('root ::= "x"{2} | "y"{1,}', ["xx", "yyy"], ["x", ""]),
        (
            'root ::= [^a-y\\]"] "\\u00e9\\n\\x41"',
            ["zé\nA", "-é\nA"],
            ["aé\nA", "]é\nA"],
        ),
        ("root ::= [a\\-c-]", ["a", "-", "c"], ["b"]),
        ('root ::= "" | "a" root', ["", "aaa"], ["b"]),
        ('root ::= . "|" tail\ntail ::= ")"', ["é|)", "\n|)"], ["|)"]),
        ('root ::= root "a" | "b" root | "c"', ["c", "bbca", "ca"], ["ac", "b"]),
        ('root ::= "a.*"', ["a.*"], ["abb"]),
    ],
)
def test_texts(text: str, right: list[str], wrong: list[str]):
    found = pattern(text)
    assert parse(found)  # what the compiler reads
    for each in right:
        assert re.fullmatch(found, each), each
    for each in wrong:
        assert not re.fullmatch(found, each), each


@pytest.mark.parametrize(
    "text",
    [
        'root ::= ("a" | "b" c)* c?\nc ::= "c" | "a" "b"',
        'root ::= pair{0,2} | "c"\npair ::= ("a" | "c") [b-c]',
        'root ::= many\nmany ::= "a" many | "b"',
        'root ::= root "a" | "b" root | "c" | ""',
        'root ::= items? "c"\nitems ::= [ab] | items "c" [ab]',
    ],
)
def test_as_xgrammar_takes_them(text: str):
    """All texts of up to five letters; xgrammar is vLLM's own backend for grammars."""
    grammar, found = xgrammar.Grammar.from_ebnf(text), re.compile(pattern(text))
    taken = 0
    for length in range(6):
        for letters in product("abc", repeat=length):
            word = "".join(letters)
            theirs = _is_grammar_accept_string(grammar, word)
            assert bool(found.fullmatch(word)) == theirs, word
            taken += theirs
    assert taken > 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('start: "a"', "line 1: ':"),
        ('a ::= "x"', "no rule 'root'"),
        ("root ::= other", "'root' names 'other'"),
        (
            'root ::= "(" root ")" | "x"',
            "'root' -> 'root' contains itself.*not regular.*write out",
        ),
        (
            'root ::= "x" list\nlist ::= "[" item "]"\nitem ::= list | "y"',
            "'list' -> 'item' -> 'list' contains itself",
        ),
        ('root ::= "a" root', "'root' never ends"),
        ('root ::= ("a"', r"a \( without its \)"),
        ('root ::= "a")', r"a \) without its \("),
        ("root ::= *", r"nothing stands in front of \*"),
        ('root ::= "a"{3,2}', "ends before it begins"),
        ("root ::= [z-a]", "ends before it begins"),
        ('root ::= "a"\nroot ::= "b"', "two rules are named 'root'"),
        ('"a"', "stands outside of a rule"),
        ("root ::= " + "(" * 99 + '"a"' + ")" * 99, "nested too deeply"),
        ('root ::= "\\UFFFFFFFF"', "is no character"),
        (
            "root ::= r0\n"
            + "\n".join(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(40))
            + '\nr40 ::= "a"',
            "more than 20000 parts",
        ),
    ],
)
def test_refusals(text: str, says: str):
    with pytest.raises(ConstraintError, match=f"(?s)^grammar: .*{says}"):
        pattern(text)
