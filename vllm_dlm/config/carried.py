# SPDX-License-Identifier: Apache-2.0
"""How a request's configuration travels from its front end to the engine.

The front end reads and checks the options (`resolve`). Scheduler and worker get the
result as plain data, under one key of `SamplingParams.extra_args`, and build the same
`RequestConfig` of it: nothing is validated again, no default looked up, no file read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm_dlm.config.cache import POLICIES
from vllm_dlm.config.canvas import Canvas
from vllm_dlm.config.growth import GROWTHS
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import RequestConfig, resolve
from vllm_dlm.config.request_options import own_options
from vllm_dlm.option_types import ThinkCoarse
from vllm_dlm.strategies import STRATEGIES

CARRIED = "dlm_carried"
"""The key. It begins as options do but is none: who sends it is refused."""

CANVAS_END = "dlm_canvas_end"
"""Another such key: where the canvas of a preempted request ends, from the scheduler to
the worker. Not part of the configuration."""

PATTERN = "dlm_pattern"
"""Another such key: a regular expression that the text must match, from the front end
to scheduler and worker (`model_executor/patterns.py`)."""

THOUGHT = "dlm_thought"
"""Beside it, the token that ends a thought in front of what must match, and how that
token reads (`constraints/thoughts.py`)."""

AUTOMATA = "dlm_automata"
"""And a folder in which the pattern's automaton may lie (`constraints/shelf.py`)
if the front end runs on the same machine."""

WATCHED = "dlm_watched"
"""And another, of a request whose canvas somebody watches: the front end's number of
whoever does (`entrypoints/frames.py`), which comes back with each frame."""

BESIDE = (PATTERN, THOUGHT, AUTOMATA, WATCHED)
"""Those that come beside the configuration."""

_SCALARS = (type(None), bool, int, float, str)


def carry(extra_args: Mapping[str, Any], config: RequestConfig) -> dict[str, Any]:
    """A request's `extra_args` with its configuration in place of its options.

    Args:
        extra_args: of the request; what others have put there stays.
        config: what `resolve` made of it.

    Returns:
        A new dict. Its options are left as they were where plain data cannot say what
        they are (see `to_plain`): the engine reads them then.
    """
    plain = to_plain(config)
    if plain is None:
        return dict(extra_args)
    own = own_options(extra_args)
    others = {key: value for key, value in extra_args.items() if key not in own}
    return {**others, CARRIED: plain}


def request_config(
    extra_args: Mapping[str, Any] | None, server: DlmConfig, defaults: ModelDefaults
) -> RequestConfig:
    """How an engine decodes a request: as its front end said, or as its options say.

    Args:
        extra_args: of the engine's request. One that came by no front end of ours has
            options in it.
        server: the server's options.
        defaults: the model's declarations.

    Raises:
        ValueError: as `resolve`, of a request that came by no front end of ours.
    """
    plain = (extra_args or {}).get(CARRIED)
    if plain is None:
        asked = {**(extra_args or {})}
        for key in BESIDE:
            asked.pop(key, None)
        return resolve(server, asked, defaults)
    return from_plain(plain)


def to_plain(config: RequestConfig) -> dict[str, Any] | None:
    """A configuration as dicts of numbers, texts and tuples of these.

    Returns:
        None where `from_plain` could not build the same again: the class of the
        strategy's parameters, which may be anybody's, has fields of other types, or
        keeps more than its fields.
    """
    kind, given = type(config.params), _set_fields(config)
    if not all(map(_is_plain, given.values())):
        return None
    if kind.model_construct(**given) != config.params:
        return None
    tccf = None if config.tccf is None else config.tccf.model_dump()
    policy = config.cache_policy.model_dump()
    plain = {field.name: getattr(config, field.name) for field in fields(config)}
    growth = config.growth_policy.model_dump()
    canvas = None if config.canvas is None else config.canvas.to_plain()
    own = {"cache_policy": policy, "growth_policy": growth, "tccf": tccf}
    own["canvas"] = canvas
    return {**plain, "params": given, **own}


def from_plain(plain: Mapping[str, Any]) -> RequestConfig:
    """The configuration of which `to_plain` made `plain`.

    Args:
        plain: as it was, or with lists for tuples, as messages between processes have
            them.
    """
    kind = STRATEGIES[plain["strategy"]].Params
    params: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in plain["params"].items()
    }
    policy = POLICIES[plain["cache"]].model_construct(**plain["cache_policy"])
    tccf = plain["tccf"] and ThinkCoarse.model_construct(**plain["tccf"])
    built = {
        "params": kind.model_construct(**params),
        "cache_policy": policy,
        "growth_policy": GROWTHS[plain["growth"]].model_construct(
            **plain["growth_policy"]
        ),
        "tccf": tccf,
        "canvas": plain["canvas"] and Canvas.from_plain(plain["canvas"]),
    }
    return RequestConfig(**{**plain, **built})


def _set_fields(config: RequestConfig) -> dict[str, Any]:
    """The strategy's parameters that somebody has set; the others have defaults."""
    params = config.params
    return {name: getattr(params, name) for name in sorted(params.model_fields_set)}


def _is_plain(value: Any) -> bool:
    """Whether messages between processes give a value back as it was."""
    if type(value) is tuple:
        return all(type(entry) in _SCALARS for entry in value)
    return type(value) in _SCALARS
