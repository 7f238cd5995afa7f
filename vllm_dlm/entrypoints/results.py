# SPDX-License-Identifier: Apache-2.0
"""An engine's results, seen by others than the handler that answers with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TypeVar

Result = TypeVar("Result")


async def watched(
    results: AsyncIterator[Result], see: Callable[[Result], object]
) -> AsyncIterator[Result]:
    """`results`, each shown to `see` before it is passed on."""
    async for result in results:
        see(result)
        yield result
