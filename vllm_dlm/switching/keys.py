# SPDX-License-Identifier: Apache-2.0
"""Which of a pair's routes need the key of `--api-key`: all but what `OPEN` lists.

vLLM guards paths by their beginnings (`/v1`, ...), so that others that do the same work
(`/invocations`, `/tokenize`), or stop it (`/sleep`), answer without a key.
"""

from __future__ import annotations

from argparse import Namespace
from hashlib import sha256
from secrets import compare_digest

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm import envs

OPEN = frozenset(
    {
        # Probes and scrapers send no key.
        *("/health", "/ping", "/load", "/metrics", "/version"),
        # The description of the server, not of its models.
        *("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
    }
)
"""Paths that answer without a key."""

OPEN_FOLDER = "/static/"
"""What the pages of `--enable-offline-docs` load."""


def keys_of(args: Namespace) -> list[str]:
    """The keys that a server takes; as for vLLM, `--api-key` wins over VLLM_API_KEY."""
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def guard(args: Namespace) -> None:
    """Have vLLM put the guard around the application that it builds of `args`.

    Later is too late: it builds the chain of its middleware, too.
    """
    if keys_of(args):
        args.middleware = [*args.middleware, f"{__name__}.{KeyGuard.__name__}"]


class KeyGuard:
    """ASGI middleware that answers 401 where a key is needed, and none is sent.

    Args:
        app: what it guards; the keys are in its state's `args`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] not in ("http", "websocket") or self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        response = JSONResponse({"error": "Unauthorized"}, status_code=401)
        await response(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        # Browsers ask with OPTIONS, and without a key, what they may send.
        if scope.get("method") == "OPTIONS":
            return True
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return True
        sent = Headers(scope=scope).get("Authorization", "")
        scheme, _, key = sent.partition(" ")
        digest = sha256(key.encode()).digest()
        # All of them: how long it takes says nothing.
        keys = keys_of(scope["app"].state.args)
        found = [compare_digest(digest, sha256(k.encode()).digest()) for k in keys]
        return scheme.lower() == "bearer" and any(found)
