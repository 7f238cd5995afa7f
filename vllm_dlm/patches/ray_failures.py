# SPDX-License-Identifier: Apache-2.0
"""Engines in Ray actors say that they failed.

There are two entries because each class has a loop of its own. Both are looked up when
they are called; Ray binds an actor's own methods before plugins are loaded in the
actor, so that none of those could be wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_dlm.patches.ledger import Where, patch

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCoreProc

_SAID = {
    "upstream": "docs/upstream.md#a-failed-engine-in-a-ray-actor-tells-nobody",
    "drop_when": "a failed engine in a Ray actor reports itself",
    "where": Where.SERVER,
    "mends_vllm": True,
}


@patch(
    "vllm.v1.engine.core:EngineCoreProc.run_busy_loop",
    why=(
        "Data parallel over Ray: clients of an engine that failed wait for ever, and "
        "/health says 200."
    ),
    **_SAID,
)
@patch(
    "vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop",
    why="The same, for mixtures of experts.",
    **_SAID,
)
def run_busy_loop(
    original: Callable[[EngineCoreProc], None],
) -> Callable[[EngineCoreProc], None]:
    """The engine tells its clients, as one in a process of its own does."""
    from vllm.v1.engine.core import EngineCoreActorMixin

    def run(self: EngineCoreProc) -> None:
        try:
            original(self)
        except Exception:
            if isinstance(self, EngineCoreActorMixin):
                self._send_engine_dead()
            raise

    return run
