# SPDX-License-Identifier: Apache-2.0
"""What a request has set: its options and parameters, and the names it set them under.

`SamplingParams.extra_args` holds them as an object under the key `dlm` (a dict or JSON
text), as keys of their own that begin with `dlm_`, or as both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dlm.config.canvas import CANVAS_OPTIONS, CanvasOptions
from vllm_dlm.config.foreign_names import PREFIX, advice, clause, plain
from vllm_dlm.config.options import (
    REQUEST_OPTIONS,
    SERVER_ONLY,
    DlmConfig,
    is_server_only,
    parse_options,
)
from vllm_dlm.config.validation import validated
from vllm_dlm.messages import LONGEST_QUOTE, OptionError, name_of, quote, unknown
from vllm_dlm.option_bounds import check_size
from vllm_dlm.option_types import read_json
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import parameter_names

MOST_KEYS = 256
"""Most keys of a request's `extra_args` that are ours: far more than there are
options."""


@dataclass(frozen=True)
class RequestOptions:
    """What one request has set; what it left open is for the server to say."""

    canvas: CanvasOptions
    """Those that bring a canvas, which no server has."""
    options: DlmConfig
    """Its options; `model_fields_set` holds the names of those that it has set."""
    flat_params: Mapping[str, Any]
    """Parameters of its strategy that were set by keys of their own, not checked yet:
    which are valid depends on the strategy, which the server may choose."""
    names: Mapping[str, str]
    """Option -> the name that it was set under, for messages."""

    def has(self, option: str) -> bool:
        """Whether the request has set an option."""
        return option in self.options.model_fields_set

    def own_params(self, strategy: str) -> tuple[dict[str, Any], dict[str, str]]:
        """The parameters that the request sets of a strategy.

        Returns:
            Parameter -> value, not checked yet, and parameter -> the name that it was
            set under.

        Raises:
            ValueError: a flat key is no parameter of the strategy, a parameter is set
                twice, or only the server may set it.
        """
        nested = self.options.strategy_config
        kind = STRATEGIES[strategy].Params
        fields, valid = kind.model_fields, parameter_names(kind)
        for name in self.flat_params:
            if name not in valid:
                raise _unknown_key(PREFIX + name, strategy)
            if name in nested:
                raise _set_twice(PREFIX + name, "strategy_config")
        inside = self.names["strategy_config"]
        set_as = {name: f"{inside}.{name}" for name in valid if name in nested}
        set_as |= {name: PREFIX + name for name in self.flat_params}
        for name in set_as:
            if name in fields and is_server_only(fields[name]):
                raise OptionError(
                    f"{set_as[name]}: {name} of the strategy {strategy!r} is set by "
                    "the server (--dlm-strategy-config); a request cannot change it",
                    set_as[name],
                )
        return {**nested, **self.flat_params}, set_as


def own_options(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of a request's `extra_args` that are options of ours.

    Raises:
        ValueError: there are very many.
    """
    own = {
        key: value
        for key, value in (extra_args or {}).items()
        if key == "dlm" or str(key).startswith(PREFIX)
    }
    if len(own) > MOST_KEYS:
        raise OptionError(f"{len(own)} keys begin with dlm; at most {MOST_KEYS} do")
    return own


def read_request(extra_args: Mapping[str, Any] | None) -> RequestOptions:
    """Read what a request has set, in any of its forms.

    Args:
        extra_args: `SamplingParams.extra_args`; entries of others are left alone.

    Raises:
        ValueError: unknown names, wrong types, values out of range, options that
            belong to the server; the message says what is valid.
    """
    own = own_options(extra_args)
    for key, value in own.items():
        check_size(name_of(key), value)
    options = _nested(own.pop("dlm", None))
    known = (*DlmConfig.model_fields, *CANVAS_OPTIONS)
    names = {name: f"dlm.{name}" for name in known}
    params: dict[str, Any] = {}
    for key, value in own.items():
        if value is None:
            continue
        name = key.removeprefix(PREFIX)
        if name in options:
            raise _set_twice(key, "dlm")
        if name in known:
            options[name], names[name] = value, key
        else:
            params[name] = value
    _refuse_the_servers(options, names)
    where = "the request's dlm options"
    of_canvas = {name: options.pop(name) for name in CANVAS_OPTIONS if name in options}
    valid = (*REQUEST_OPTIONS, *CANVAS_OPTIONS)
    parsed = parse_options(options, where=where, valid=valid, names=names)
    canvas = validated(CanvasOptions, of_canvas, where=where, names=names)
    return RequestOptions(canvas, parsed, params, names)


def _nested(value: Any) -> dict[str, Any]:
    """The options in the object `dlm`.

    Raises:
        ValueError: it is neither a dict nor the JSON text of one.
    """
    try:
        nested = read_json(value)
    except ValueError as error:
        raise OptionError(f"dlm: {error}", "dlm") from None
    if not isinstance(nested, Mapping | None):
        raise OptionError(
            "dlm: expected an object of options, as a dict or as JSON text, got "
            f"{type(nested).__name__}",
            "dlm",
        )
    return {str(name): value for name, value in (nested or {}).items()}


def _refuse_the_servers(options: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Refuse options that only a server may set.

    Raises:
        ValueError: a request sets one.
    """
    for name in SERVER_ONLY:
        if options.get(name) is not None:
            flag = f"--dlm-{name.replace('_', '-')}"
            raise OptionError(
                f"{names[name]} is an option of the server ({flag}); a request may "
                f"set: {', '.join((*REQUEST_OPTIONS, *CANVAS_OPTIONS))}",
                names[name],
            )


def _unknown_key(key: str, strategy: str) -> OptionError:
    """The error about a flat key that is neither an option nor a parameter of the
    strategy."""
    own = parameter_names(STRATEGIES[strategy].Params)
    valid = [PREFIX + option for option in (*REQUEST_OPTIONS, *CANVAS_OPTIONS, *own)]
    found = advice(plain(key[:LONGEST_QUOTE]))
    hint = f"Here it is: {clause(found)}." if found else ""
    return OptionError(
        f"the request (strategy {strategy!r}): {unknown(key, valid, hint=hint)}", key
    )


def _set_twice(key: str, other: str) -> OptionError:
    return OptionError(
        f"{quote(key)} is also set in {other!r}; set it in one place", key
    )
