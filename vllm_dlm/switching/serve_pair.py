# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm serve-pair SMALL LARGE`: one OpenAI endpoint over two engines."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dlm.switching.entropy import LARGE, SMALL, Model, SwitchRule, make_rule

EPILOG = """\
example:
  vllm-dlm serve-pair llama-tiny-draft llama-tiny --tau 0.5 --port 8000

The small model writes until the mean entropy of its last tokens reaches tau; then the
large one goes on until its own mean is down at tau (arXiv 2502.06833). What tau suits
two models is found by trying: ask with other values in a request, under `vllm_xargs`:
  {"vllm_xargs": {"ead_tau": 0.8, "ead_window": 5, "ead_min_tokens": 10}}

Answers say who wrote what, in `choices[i].segments`. The text is that of neither model;
if the large one's own text is wanted, speculative decoding gives it, and often faster.
"""

_JSON = "a JSON object"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "Serve one OpenAI endpoint over two models of one tokenizer."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "small",
        metavar="SMALL",
        help="model that begins: folder, hub id or alias",
    )
    parser.add_argument(
        "large", metavar="LARGE", help="model that helps: folder, hub id or alias"
    )
    rule = parser.add_argument_group("when they change")
    for name, field in SwitchRule.model_fields.items():
        kind = {"tau": float, "unit": str}.get(name, int)
        text = field.description or ""
        if not field.is_required():
            text += f" (default: {field.default})"
        rule.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar="{bits,nats}" if name == "unit" else "N",
            default=argparse.SUPPRESS,
            required=field.is_required(),
            help=text,
        )
    rule.add_argument(
        "--stop-token-id",
        type=int,
        metavar="ID",
        help="token that tells an engine to stop and that no text contains (default: "
        "an unused id of the vocabulary, else the mask, padding or begin token)",
    )
    server = parser.add_argument_group("the server")
    server.add_argument("--host", help="address to listen on (default: all)")
    server.add_argument(
        "--port", type=int, default=8000, help="port (default: %(default)s)"
    )
    server.add_argument("--api-key", metavar="KEY", help="key that clients must send")
    server.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name that clients ask for (default: SMALL+LARGE)",
    )
    server.add_argument(
        "--serve-args",
        type=_json_object,
        default={},
        metavar="JSON",
        help="more options of `vllm serve` for its HTTP side, by their names: "
        '\'{"chat_template": "chat.jinja", "uvicorn_log_level": "warning"}\'',
    )
    engines = parser.add_argument_group(
        "the engines",
        "Arguments of vllm.EngineArgs as JSON. Without gpu_memory_utilization or\n"
        "kv_cache_memory_bytes the engines take 25 % and 65 % of the memory.",
    )
    for name, whose in (
        ("--engine-args", "both engines"),
        ("--small-args", "the small model's engine; they win over --engine-args"),
        ("--large-args", "the large model's engine; they win over --engine-args"),
    ):
        engines.add_argument(
            name,
            type=_json_object,
            default={},
            metavar="JSON",
            help=f"of {whose}",
        )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it.

    Raises:
        ValueError: options that are not valid, or models that do not fit together.
    """
    given = vars(args)
    rule = make_rule(
        **{name: given[name] for name in SwitchRule.model_fields if name in given}
    )

    import uvloop

    from vllm_dlm.switching.server import serve

    models: dict[Model, str] = {SMALL: args.small, LARGE: args.large}
    options: dict[Model, Mapping[str, Any]] = {
        SMALL: args.engine_args | args.small_args,
        LARGE: args.engine_args | args.large_args,
    }
    name = args.served_model_name or "+".join(
        Path(each).name for each in models.values()
    )
    http: dict[str, Any] = {"port": args.port, "served_model_name": name}
    http |= {key: given[key] for key in ("host", "api_key") if given[key] is not None}
    uvloop.run(serve(models, options, rule, args.stop_token_id, http | args.serve_args))
    return 0


def _json_object(text: str) -> dict[str, Any]:
    """An argparse type."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not {_JSON}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not {_JSON} but {type(value).__name__}")
    return value
