# SPDX-License-Identifier: Apache-2.0
"""What a request may choose, as JSON that the page makes its forms of.

It follows from the strategies' own declarations and from `DlmConfig`: a strategy that
is added anywhere is on the page without a change here.
"""

from __future__ import annotations

from typing import Any

from vllm_dlm.config.options import DlmConfig, is_server_only
from vllm_dlm.strategies import STRATEGIES

OPTIONS = ("block_length", "steps", "cache", "eotp", "eotp_threshold")
"""Those of `DlmConfig` that the page offers beside a strategy and its parameters."""


def forms() -> dict[str, Any]:
    """Strategies and options, with a JSON schema of the fields of each."""
    schema = DlmConfig.model_json_schema()
    return {
        "strategies": [_strategy(name) for name in STRATEGIES],
        "options": {name: schema["properties"][name] for name in OPTIONS},
    }


def _strategy(name: str) -> dict[str, Any]:
    kind = STRATEGIES[name]
    schema = kind.Params.model_json_schema()
    properties = {
        field: _inlined(entry, schema.get("$defs", {}))
        for field, entry in schema.get("properties", {}).items()
        if not is_server_only(kind.Params.model_fields[field])
    }
    return {
        "name": name,
        "summary": kind.summary,
        "source": kind.paper,
        "parameters": properties,
        "presets": sorted(kind.Params.presets),
    }


def _inlined(entry: Any, defs: dict[str, Any]) -> Any:
    """A schema without references to `defs`."""
    if isinstance(entry, list):
        return [_inlined(each, defs) for each in entry]
    if not isinstance(entry, dict):
        return entry
    if "$ref" in entry:
        name = entry["$ref"].rpartition("/")[2]
        rest = {key: value for key, value in entry.items() if key != "$ref"}
        return {**_inlined(defs[name], defs), **rest}
    return {key: _inlined(value, defs) for key, value in entry.items()}
