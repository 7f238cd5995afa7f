# SPDX-License-Identifier: Apache-2.0
"""A server that ends answers its open requests first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm_dlm.patches.ledger import Where, patch

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SAID = "the server is shutting down"


@patch(
    "vllm.v1.engine.async_llm:AsyncLLM.shutdown",
    why=(
        "It ends the engine and cancels the task that hands out what the engine says. "
        "Requests that are open then wait for ever, and the HTTP server for them: "
        "after a SIGTERM neither ends."
    ),
    upstream="docs/upstream.md#requests-that-are-open-at-a-shutdown-get-no-answer",
    drop_when="vLLM ends open requests when it shuts the engine down",
    where=Where.SERVER,
    mends_vllm=True,
)
def shutdown(original: Callable[..., None]) -> Callable[..., None]:
    """Open requests get an HTTP 503, or an event that says so in a stream."""

    def end(self: AsyncLLM, *args: Any, **kwargs: Any) -> None:
        from vllm.exceptions import GracefulHTTPError

        original(self, *args, **kwargs)
        handler = self.output_handler
        if handler is None:
            return  # nothing was ever asked
        error = GracefulHTTPError(SAID, HTTPStatus.SERVICE_UNAVAILABLE)
        # The server calls this in a thread; at its very end there may be no loop left.
        with contextlib.suppress(RuntimeError):
            handler.get_loop().call_soon_threadsafe(
                self.output_processor.propagate_error, error
            )

    return end
