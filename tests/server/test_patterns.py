# SPDX-License-Identifier: Apache-2.0
"""Patterns that llada-tiny's few words can spell, over HTTP: every text matches.

JSON and tools take a model with other tokens: `test_structured.py`, `test_tools.py`.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server.launch import Server

LIST = r"\[[A-Z][a-z]+(, [A-Z][a-z]+){1,3}\]"


def streamed(server: Server, **options: Any) -> str:
    chunks = server.complete(stream=True, **options)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_completion_matches(server: Server, temperature: int):
    options: dict[str, Any] = {
        "structured_outputs": {"regex": LIST},
        "max_tokens": 32,
        "temperature": temperature,
        "seed": 3,
    }
    text = server.text("Sort [Eva, Rosa, Hana]", **options)
    assert re.fullmatch(LIST, text)
    assert streamed(server, prompt="Sort [Eva, Rosa, Hana]", **options) == text


def test_a_chat_chooses(server: Server):
    options = {"structured_outputs": {"choice": ["Ada", "Ben"]}, "max_tokens": 8}
    assert server.chat(**options).choices[0].message.content in ("Ada", "Ben")


def test_neighbours_without_a_pattern_are_as_alone(server: Server):
    def ask(i: int) -> str:
        pattern = {"structured_outputs": {"regex": rf"[A-Z][a-z]+, {i}"}}
        return server.text(
            "Copy [Ada, Ben]", max_tokens=16, **(pattern if i % 2 else {})
        )

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(8)))
    assert {texts[i] for i in range(0, 8, 2)} == {ask(0)}
    assert all(re.fullmatch(rf"[A-Z][a-z]+, {i}", texts[i]) for i in range(1, 8, 2))
