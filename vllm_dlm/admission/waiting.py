# SPDX-License-Identifier: Apache-2.0
"""Requests with a constraint, as far as that takes no automaton.

What the server adds to a constraint, and how a request's handler waits while the
constraint is compiled. `structured.py` has the rest; it imports numba, for which nobody
waits who only lists the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

FIELD = "structured_outputs"


class NotCompiledYet(BaseException):
    """A constraint that somebody has to wait for.

    It is no `Exception`, which vLLM's handlers would turn into an answer.

    Args:
        start: compiles it elsewhere; the future says when that is done.
    """

    def __init__(self, start: Callable[[], Future[Any]]) -> None:
        super().__init__()
        self.start = start


_somebody_waits: ContextVar[bool] = ContextVar("vllm_dlm_waits", default=False)


def somebody_waits() -> bool:
    """Whether `NotCompiledYet` is caught where it is raised now."""
    return _somebody_waits.get()


@contextmanager
def _waited_for() -> Iterator[None]:
    token = _somebody_waits.set(True)
    try:
        yield
    finally:
        _somebody_waits.reset(token)


async def with_constraints(body: Any, answer: Callable[[Any], Awaitable[Any]]) -> Any:
    """Answer a request, and again once its constraint is compiled.

    Args:
        body: of the request; each try gets one of its own, as parsers write into it.
        answer: handles a body.
    """
    if not _may_constrain(body):
        return await answer(body)
    while True:
        own = body.model_copy(deep=True)
        try:
            with _waited_for():
                return await answer(own)
        except NotCompiledYet as missing:
            start = missing.start
        await asyncio.wrap_future(start())


def _may_constrain(body: Any) -> bool:
    """Whether a body has a field from which a constraint may come."""
    names = (FIELD, "response_format", "tools", "text", "output_config")
    if any(getattr(body, name, None) for name in names):
        return True
    inner = getattr(body, "sampling_params", None)
    return getattr(inner, FIELD, None) is not None


def add_the_servers(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """What `--structured-outputs-config` says of JSON, for a request's constraint.

    Args:
        params: of one request; the object with its constraint is replaced.
    """
    asked = params.structured_outputs
    if asked is None:
        return
    server = vllm_config.structured_outputs_config
    for name in ("disable_any_whitespace", "disable_additional_properties"):
        if getattr(server, name) and not getattr(asked, name):
            asked = replace(asked, **{name: True})
    params.structured_outputs = asked
