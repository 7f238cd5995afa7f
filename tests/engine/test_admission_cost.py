# SPDX-License-Identifier: Apache-2.0
"""What the device is asked when requests come: as much for eight as for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine.cases import make_prompt
from engine.harness import Engine, params
from engine.test_no_waits import Waits
from operations import Operations

ADMISSION = (
    ("model_state", "add_request"),
    ("sampler", "add_request"),
    ("sampler", "apply_staged_writes"),
)


@contextmanager
def admissions_under(engine: Engine, mode: Any) -> Iterator[None]:
    """Whatever vLLM's runner calls to admit requests is called under a mode."""

    def under(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            with mode:
                return call(*args)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ADMISSION:
            part = getattr(engine.runner, owner)
            patch.setattr(part, name, under(getattr(part, name)))
        yield


def admit(engine: Engine, mode: Any, requests: int, **options: Any) -> None:
    dlm = options.pop("dlm")
    for number in range(requests):
        sampling = params(24, dlm=dlm, ignore_eos=True, **options)
        engine.add(make_prompt(5 + number, number), sampling)
    with admissions_under(engine, mode):
        engine.step()
    assert len(engine.runner.model_state.slots.requests) == requests
    while engine.busy:
        engine.step()
    engine.flush()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"dlm": {"strategy": "threshold", "block_length": 8}},
            marks=pytest.mark.slow,
        ),
        {"dlm": {"strategy": "cad", "eotp": "block"}, "temperature": 0.7, "seed": 3},
        {"dlm": {"strategy": "static"}, "stop_token_ids": [7, 8, 9], "top_k": 4},
    ],
    ids=["threshold", "cad", "static"],
)
def test_any_number_of_admissions_takes_four_operations(
    engine: Engine, options: dict[str, Any]
):
    for requests in (1, 2, 8):
        done = Operations()
        admit(engine, done, requests, **options)
        assert done.names == ["index_copy_"] * 4


def test_seats_are_there_already(engine: Engine):
    """What a strategy remembers of a request needs no making, but for the first."""
    dlm = {"strategy": "slowfast", "block_length": 8}
    admit(engine, Operations(), 8, dlm=dlm)
    for requests in (1, 2, 8):
        done = Operations()
        admit(engine, done, requests, dlm=dlm)
        assert done.names == ["index_copy_"] * 4


def test_admissions_do_not_wait(engine: Engine):
    waits = Waits()
    sampled = {"temperature": 0.7, "seed": 3, "logprobs": 2}
    admit(engine, waits, 3, dlm={"strategy": "slowfast"}, **sampled)
    assert not waits.seen
