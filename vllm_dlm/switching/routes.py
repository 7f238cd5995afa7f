# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's routes a pair's server has: those that make sense for two engines.

vLLM also registers routes for one engine, or one set of weights: adapters, scores,
remote calls, weight updates, disaggregated serving. Here such a route would reach one
of the two, so it does not exist: a request for it is answered with 404.
"""

from __future__ import annotations

from fastapi import FastAPI

TEXT = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/messages",
    "/invocations",
)
"""A text that both models write."""

SHARED = (
    "/v1/models",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
)
"""What is the same of both models."""

BOTH = (
    "/health",
    "/ping",
    "/load",
    "/metrics",
    # With VLLM_SERVER_DEV_MODE=1.
    "/reset_prefix_cache",
    "/sleep",
    "/wake_up",
    "/is_sleeping",
)
"""What is asked of, or done to, both engines."""

SERVER = (
    "/version",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    "/openapi.json",
    "/static",
)
"""Routes of the server itself."""

SERVED = frozenset({*TEXT, *SHARED, *BOTH, *SERVER})


def keep_served(app: FastAPI) -> None:
    """Take all other routes off vLLM's application.

    Raises:
        RuntimeError: the application does not say which routes it has.
    """
    paths = [getattr(route, "path", None) for route in app.routes]
    if "/v1/completions" not in paths:
        raise RuntimeError(
            "vLLM's application does not list its routes; a pair's server needs a "
            "FastAPI that does (below 0.137)"
        )
    app.router.routes[:] = [
        route for route, path in zip(app.routes, paths, strict=True) if path in SERVED
    ]
