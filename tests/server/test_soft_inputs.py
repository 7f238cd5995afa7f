# SPDX-License-Identifier: Apache-2.0
"""A server that feeds its model mixtures of tokens, by its flag."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server.launch import MODEL, SIZES, VLLM, Server, running_server

pytestmark = pytest.mark.slow

QUESTION = "Spell ngkkkx backwards"


@pytest.fixture(scope="module")
def soft_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [VLLM, "serve", "--model", MODEL, *SIZES, "--dlm-soft-inputs"]
    command += ["--dlm-strategy", "smooth", "--dlm-cache", "dual"]
    log = tmp_path_factory.mktemp("soft") / "log"
    with running_server(command, log, MODEL) as running:
        yield running


def test_its_own_strategy_and_others(soft_server: Server, server: Server):
    own = soft_server.complete(QUESTION, max_tokens=32)
    named = soft_server.complete(
        QUESTION, max_tokens=32, vllm_xargs={"dlm_strategy": "smooth"}
    )
    assert own.choices[0].text == named.choices[0].text != ""
    dmax = {"dlm_strategy": "dmax", "dlm_preset": "code"}
    assert soft_server.complete(QUESTION, max_tokens=32, vllm_xargs=dmax).choices
    # Those that feed tokens write what they write elsewhere.
    plain = {"dlm_strategy": "threshold", "dlm_cache": "none"}
    here, there = (
        one.complete(QUESTION, max_tokens=32, vllm_xargs=plain)
        for one in (soft_server, server)
    )
    assert here.choices[0].text == there.choices[0].text
