# SPDX-License-Identifier: Apache-2.0
"""A pair's HTTP server: vLLM's own application over a `PairClient`."""

from __future__ import annotations

import json
import signal
from argparse import ArgumentError, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.logger import init_logger
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_dlm.messages import unknown
from vllm_dlm.switching.client import PairClient
from vllm_dlm.switching.entropy import LARGE, Model, SwitchRule
from vllm_dlm.switching.keys import guard
from vllm_dlm.switching.metrics import PairStatLogger
from vllm_dlm.switching.pair import Pair, plan_pair
from vllm_dlm.switching.responses import report_writers
from vllm_dlm.switching.routes import keep_served

try:
    from vllm.entrypoints.common.cli_args import (
        FrontendArgs,
        make_arg_parser,
        validate_parsed_serve_args,
    )
except ModuleNotFoundError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import (
        FrontendArgs,
        make_arg_parser,
        validate_parsed_serve_args,
    )

logger = init_logger(__name__)

_ONE_ENGINE = frozenset(
    {
        *("lora_modules", "tokens_only", "enable_scale_out", "grpc_port"),
        *("data_parallel_supervisor_port", "dp_supervisor_probe_interval_s"),
        *("dp_supervisor_probe_timeout_s", "dp_supervisor_probe_failure_threshold"),
        *("enable_per_request_metrics", "enable_flash_late_interaction"),
        *("cohere_is_reasoning_model", "cohere_format"),
    }
)
"""Options of the HTTP side for what a pair's server does not have."""


async def serve(
    models: Mapping[Model, str],
    options: Mapping[Model, Mapping[str, Any]],
    rule: SwitchRule,
    stop_token_id: int | None,
    http: Mapping[str, Any],
) -> None:
    """Start both engines and serve until a signal comes.

    Args:
        models: folders, hub ids or aliases.
        options: of each engine: arguments of `vllm.EngineArgs`.
        rule: of requests that do not bring their own.
        stop_token_id: the reserved token; one is chosen without it.
        http: options of `vllm serve` for its HTTP side.

    Raises:
        ValueError: options that are not valid, or models that do not fit together.
    """
    args = serve_arguments(models[LARGE], http)
    guard(args)
    pair = plan_pair(
        models, options, stop_token_id=stop_token_id, args_class=AsyncEngineArgs
    )
    signal.signal(signal.SIGTERM, _interrupt)
    address, socket = setup_server(args, reuse_port=False)
    log_config = get_uvicorn_log_config(args)
    try:
        with _started(pair) as engines:
            client = PairClient(engines, pair, rule)
            # Where vLLM's handlers look for the engine's reasoning parser.
            args.structured_outputs_config = (
                client.vllm_config.structured_outputs_config
            )
            tasks = await client.get_supported_tasks()
            app = build_app(args, tasks, client.model_config)
            await init_app_state(client, app.state, args, tasks)
            keep_served(app)
            report_writers(app.state)
            logger.info("Serving a pair of models on %s", address)
            stopped = await serve_http(
                app,
                sock=socket,
                enable_ssl_refresh=args.enable_ssl_refresh,
                host=args.host,
                port=args.port,
                log_level=args.uvicorn_log_level,
                access_log=not args.disable_uvicorn_access_log,
                timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
                ssl_keyfile=args.ssl_keyfile,
                ssl_certfile=args.ssl_certfile,
                ssl_ca_certs=args.ssl_ca_certs,
                ssl_cert_reqs=args.ssl_cert_reqs,
                ssl_ciphers=args.ssl_ciphers,
                h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
                h11_max_header_count=args.h11_max_header_count,
                **({} if log_config is None else {"log_config": log_config}),
            )
        await stopped
    finally:
        socket.close()


def serve_arguments(model: str, http: Mapping[str, Any]) -> Namespace:
    """`vllm serve`'s arguments for its HTTP side.

    Raises:
        ValueError: an option that `vllm serve` does not know, or a wrong value.
    """
    # These two are an engine's for vLLM; all others are the HTTP side's.
    known = ["served_model_name", "enable_log_requests"]
    known += [
        field.name for field in fields(FrontendArgs) if field.name not in _ONE_ENGINE
    ]
    words = ["--model", model]
    for name, value in http.items():
        if name.replace("-", "_") not in known:
            raise ValueError(f"the HTTP side's options: {unknown(name, known)}")
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list) and flag in ("--api-key", "--served-model-name"):
            words += [flag, *map(str, value)]
        elif isinstance(value, list) and flag == "--middleware":
            words += [word for each in value for word in (flag, str(each))]
        else:
            words += [flag, value if isinstance(value, str) else json.dumps(value)]
    parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    try:
        args = parser.parse_args(words)
        validate_parsed_serve_args(args)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(
            f"the HTTP side's options: {error}; `vllm serve --help=Frontend` explains "
            "them"
        ) from None
    return args


@contextmanager
def _started(pair: Pair) -> Iterator[dict[Model, AsyncLLM]]:
    """Both engines, one after the other: each measures the memory that is free."""
    engines: dict[Model, AsyncLLM] = {}
    try:
        for model, engine_args in pair.engine_args.items():
            logger.info("Starting the engine of the %s model", model)
            engines[model] = AsyncLLM.from_engine_args(
                engine_args, stat_loggers=[PairStatLogger]
            )
        yield engines
    finally:
        for engine in engines.values():
            engine.shutdown()


def _interrupt(*_: Any) -> None:
    """SIGTERM before the server handles it: leave, and stop what was started."""
    raise KeyboardInterrupt("terminated")
