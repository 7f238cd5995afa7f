# SPDX-License-Identifier: Apache-2.0
"""Keys that people would take for our options, where nobody reads them.

A body's unknown fields are dropped by vLLM, and so are unknown keys of `vllm_xargs`:
the request would be answered with 200, and the option would have changed nothing. What
is meant is recognised by name: one of ours without its prefix, spelt in another way or
misspelt, or the name that other servers and the models' own scripts give it. All other
keys are none of our business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from itertools import islice
from typing import Any

from vllm_dlm.config.cache import POLICIES
from vllm_dlm.config.canvas import CANVAS_OPTIONS
from vllm_dlm.config.foreign_names import (
    FOREIGN,
    OTHERS_PREFIXES,
    PREFIX,
    advice,
    clause,
    plain,
)
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.messages import OptionError, closest, name_of, quote
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import parameter_names

EVERYDAY = frozenset(
    {
        *("ahead", "bound", "cache", "commit", "decay", "drafts", "edit", "exponent"),
        *("fewest", "filter", "frequencies", "highest", "history", "lowest", "mode"),
        *("most", "preset", "radius", "schedule", "strict", "weight", "window"),
        *("canvas", "holes", "pinned", "suffix"),
    }
)
"""Names of ours that are everyday words: at the top level of a body they may mean
anything, so they are recognised in `vllm_xargs` alone."""

CARRIERS = ("vllm_xargs", "extra_args", "extra_body", "sampling_params")
"""Objects in which options are sent; which one is read depends on the route."""

_LONGEST_NAME = 64
_MOST_KEYS = 1000
"""Keys of one object that are looked at; a request written by hand, or by a program
that reads the answers, has fewer."""
_MOST_GUESSES = 32
"""Keys of one object that are compared with ours for misspellings."""
_CLOSE, _VERY_CLOSE = 0.84, 0.93
"""Similarity, as `difflib` measures it, from which a name is taken for one of ours, or
for another server's."""
_SHORTEST_GUESS = 6


@cache
def own_names() -> frozenset[str]:
    """The names of all options and of all parameters of strategies and cache policies,
    without a prefix."""
    names = {*DlmConfig.model_fields, *CANVAS_OPTIONS}
    for name in STRATEGIES:
        names.update(parameter_names(STRATEGIES[name].Params))
    for policy in POLICIES.values():
        names.update(policy.model_fields)
    return frozenset(names)


def is_prefixed(key: object) -> bool:
    """Whether a key is `dlm` or begins with it, however it is spelt."""
    if not isinstance(key, str):
        return False
    head = plain(key[:_LONGEST_NAME])
    return head == "dlm" or head.startswith(PREFIX)


@lru_cache(maxsize=4096)
def meant(key: str, everyday: bool, guess: bool) -> str | None:
    """What to write instead of a key that nobody reads; None if it is not for us.

    Args:
        key: as the client sent it.
        everyday: whether everyday words are taken for ours.
        guess: whether misspellings are looked for.
    """
    name, ours = plain(key), own_names()
    for prefix in ("", *OTHERS_PREFIXES):
        rest = name[len(prefix) :]
        is_clear = prefix or everyday or rest not in EVERYDAY
        if is_clear and name.startswith(prefix) and rest in ours:
            return PREFIX + rest
    if name in ("dlm", "dllm"):
        return "dlm"
    if found := advice(name):
        return found
    rest = name.removeprefix(PREFIX)
    if guess and len(rest) >= _SHORTEST_GUESS:
        if close := closest(rest, sorted(ours - EVERYDAY), _CLOSE):
            return PREFIX + close
        if close := closest(rest, FOREIGN, _VERY_CLOSE):
            return FOREIGN[close]
    return "docs/serving.md has the options" if is_prefixed(key) else None


def find_stray(
    keys: Iterable[object], *, ours: bool, everyday: bool = False
) -> tuple[str, str] | None:
    """The first key that is meant for us, and what to write instead.

    Args:
        keys: any number of keys that nobody reads.
        ours: whether the model is one of ours; for others, only `dlm...` is for us.
        everyday: whether everyday words are taken for ours.
    """
    guesses = _MOST_GUESSES
    for key in islice(keys, _MOST_KEYS):
        if not isinstance(key, str):
            continue
        if not ours or len(key) > _LONGEST_NAME:
            if is_prefixed(key):
                return key, plain(key[:_LONGEST_NAME])
            continue
        guesses -= 1
        if instead := meant(key, everyday, guesses >= 0):
            return key, instead
    return None


def refuse_unread(keys: Iterable[object]) -> None:
    """Refuse keys of `vllm_xargs` or `extra_args` that are meant for us, but not read.

    Raises:
        OptionError: `threshold`, `dlm-steps`, `gen_length`, ...
    """
    if found := find_stray(keys, ours=True, everyday=True):
        key, instead = found
        raise OptionError(f"{quote(key)} would be ignored: {clause(instead)}", key)


def refuse_best_of(unread: Mapping[str, Any], count: object) -> None:
    """Refuse to return the best of more texts than are asked for, which vLLM drops.

    Args:
        unread: as of `refuse_stray`.
        count: how many texts are returned (`n`).

    Raises:
        OptionError: `best_of` is set, and is another number.
    """
    best_of = unread.get("best_of")
    if best_of not in (None, 1, count or 1):
        raise OptionError(
            "best_of is not supported: texts are not ranked here; ask for all of them "
            "with `n`, or rank them with vllm-dlm search",
            "best_of",
        )


def refuse_stray(
    unread: Mapping[str, Any], carrier: str, path: str = "", *, ours: bool
) -> None:
    """Refuse fields of a body that are meant for us, and that vLLM drops.

    Args:
        unread: fields of a body, or of an object in it, that the route does not know.
        carrier: where this route reads options (`vllm_xargs`).
        path: of that object, with a dot behind it.
        ours: whether the model is one of ours; for others, only `dlm...` is for us.

    Raises:
        OptionError: it names the field, and what to use.
    """
    # What is null asks for nothing.
    unread = {name: value for name, value in unread.items() if value is not None}
    if found := find_stray(unread, ours=ours):
        key, instead = found
        name = path + name_of(key)
        if not instead.startswith("dlm"):
            raise OptionError(
                f"{quote(path + key)} is not an option here: {clause(instead)}", name
            )
        place = path.rstrip(".") or "the top level of a request"
        example = f'{{"{instead}": ...}}'
        for level in reversed(carrier.split(".")):
            example = f'{{"{level}": {example}}}'
        raise OptionError(
            f'{name}: not read from {place}; put options into "{carrier}", as in '
            f"{example}",
            name,
        )
    for name in CARRIERS:
        if name in unread and (key := _found_inside(name, unread[name], ours)):
            raise OptionError(
                f"{path}{name} is not read by this route, and {quote(key)} in it would "
                f'be ignored; put options into "{carrier}"',
                path + name,
            )


def _found_inside(carrier: str, inside: object, ours: bool, depth: int = 2) -> str:
    """A key that is meant for us in an object in which options are sent, or ""."""
    if not isinstance(inside, Mapping):
        return ""
    everyday = carrier in ("vllm_xargs", "extra_args")
    if found := find_stray(inside, ours=ours, everyday=everyday):
        return found[0]
    if depth == 0:
        return ""
    deeper = (
        _found_inside(name, inside[name], ours, depth - 1)
        for name in CARRIERS
        if name in inside
    )
    return next(filter(None, deeper), "")
