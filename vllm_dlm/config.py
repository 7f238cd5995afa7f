# SPDX-License-Identifier: Apache-2.0
"""Everything a server or a request may set, validated once and in one place.

A server's options arrive as `additional_config["dlm"]` (flags, `LLM(dlm_*=...)` or a
plain dict), a request's as `SamplingParams.extra_args`. `resolve` merges request over
server over the model's own defaults.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from vllm_dlm.messages import explain, unknown
from vllm_dlm.model_defaults import DEFAULT_MAX_CANVAS, ModelDefaults
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, numeric_fields

Cache = Literal["none", "prefix", "dual"]

WHOLE_CANVAS = "canvas"
"""A block length: the whole canvas is one block, as wide as `max_tokens`."""

SERVER_ONLY = ("max_canvas", "online_learning", "filter_dir", "record_traces")
"""Options a request cannot change."""

SERVER_PARAMETER = {"server_only": True}
"""`json_schema_extra` of a strategy parameter that no request may set (paths, say)."""

LONGEST_REQUEST_BLOCK = 64
"""Positions; a request may not ask for longer blocks, unless the server's are longer.

Every request of a batch gets logits for as many rows as the longest block has, so one
client's long block would be paid for by all.
"""

PREFIX = "dlm_"
"""Of the flat form of a request's options (`dlm_strategy`, `dlm_threshold`, ...)."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected an integer, not a boolean")
    return value


def _parse_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None


def _check_block_length(value: Any) -> Any:
    if value == WHOLE_CANVAS:
        return value
    try:
        number = 0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = 0
    if 1 <= number <= 1024 and number == int(number):
        return int(number)
    raise ValueError(
        f"expected an integer from 1 to 1024 or {WHOLE_CANVAS!r}, got {value!r}"
    )


Count = Annotated[int, BeforeValidator(_refuse_bool)]
BlockLength = Annotated[int | Literal["canvas"], BeforeValidator(_check_block_length)]


class DlmConfig(BaseModel):
    """Options of a server; a request may set those not in `SERVER_ONLY`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str | None = Field(
        default=None,
        description="Decoding strategy: which masked positions are written in a step. "
        "`vllm-dlm strategies` lists them. Default: the model's own.",
    )
    strategy_config: Annotated[dict[str, Any], BeforeValidator(_parse_json)] = Field(
        default_factory=dict,
        description="The strategy's own parameters, as a JSON object; "
        "`vllm-dlm strategies NAME` lists them.",
    )
    block_length: BlockLength | None = Field(
        default=None,
        description="Positions decoded together before the next block begins, from 1 "
        "to 1024, or `canvas`: the whole output is one block. Block-causal models are "
        "trained for one length, which only the server may change. Default: the "
        "model's own.",
    )
    sub_block_length: Count | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Positions of a block that may be written at a time, from the "
        "left; the whole block is computed all the same (Fast-dLLM v2). Default: the "
        "model's own, mostly the whole block.",
    )
    cache: Cache = Field(
        default="none",
        description="KV policy of models with full attention: `none` recomputes "
        "everything in each step and is exact; `prefix` keeps what is left of the "
        "block, `dual` both sides of it, until the block is done: faster, approximate "
        "(Fast-dLLM, arXiv 2505.22618).",
    )
    steps: Count | None = Field(
        default=None,
        ge=1,
        description="Denoise steps of a request over its whole canvas, spread evenly "
        "over its blocks, for strategies that follow a schedule. Default: one token "
        "per step.",
    )
    steps_per_block: Count | None = Field(
        default=None,
        ge=1,
        description="The same per block, as block-causal models' own code counts.",
    )
    reference_exact: bool = Field(
        default=False,
        description="Decode as the published reference code does, quirks included: the "
        "mask token may be predicted, and where that code measures confidence after "
        "temperature and top-k/p, so is it here. To compare with it, not to serve.",
    )
    max_canvas: Count | None = Field(
        default=None,
        ge=1,
        description="Most positions a request's canvas may have at a time; longer "
        "outputs continue on a further canvas. Default: "
        f"the model's own, or {DEFAULT_MAX_CANVAS}, at most the context length.",
    )
    online_learning: bool = Field(
        default=True,
        description="Let strategies with a learned part (learn2pd) learn in the "
        "background from finished requests; no text is stored.",
    )
    filter_dir: str | None = Field(
        default=None,
        description="Folder where learned filters are kept. Default: "
        "vllm-dlm/filters in $XDG_CACHE_HOME or ~/.cache.",
    )
    record_traces: bool = Field(
        default=False,
        description="Keep confidences of finished requests in memory, whatever their "
        "strategy; `vllm-dlm traces` reads them. No text is kept.",
    )

    @model_validator(mode="after")
    def _count_steps_once(self) -> Self:
        if self.steps and self.steps_per_block:
            raise ValueError("set steps or steps_per_block, not both")
        return self

    @field_validator("strategy")
    @classmethod
    def _check_strategy(cls, name: str | None) -> str | None:
        return None if name is None else STRATEGIES.check(name)

    @classmethod
    def from_mapping(cls, mapping: Any, *, where: str) -> DlmConfig:
        """Validate options.

        Args:
            mapping: option name -> value; None means "not set". Strings are taken for
                numbers and JSON where those are expected.
            where: names the source in error messages.

        Raises:
            ValueError: unknown names, wrong types, values out of range; the message
                says what is valid.
        """
        config = parse_options(mapping, where=where)
        if config.strategy is not None:
            parse_params(config.strategy, config.strategy_config, where=where)
        return config

    def canvas_limit(
        self, max_model_len: int, default: int = DEFAULT_MAX_CANVAS
    ) -> int:
        """Most positions of a canvas.

        Args:
            max_model_len: the model's context length, in tokens.
            default: the model's `ModelDefaults.max_canvas`.
        """
        return min(self.max_canvas or default, max_model_len)

    def filters_path(self) -> Path:
        """Folder of learned filters; it need not exist yet."""
        if self.filter_dir is not None:
            return Path(self.filter_dir).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "vllm-dlm" / "filters"

    def strategy_options(self) -> dict[str, Any]:
        """`Context.options` of the strategies this server builds."""
        return {
            "filter_dir": str(self.filters_path()),
            "online_learning": self.online_learning,
        }


def _set_twice(key: str, other: str) -> ValueError:
    return ValueError(f"{key!r} is also set in {other!r}; set it in one place")


REQUEST_OPTIONS = tuple(
    name for name in DlmConfig.model_fields if name not in SERVER_ONLY
)
"""Options a request may set."""


@dataclass(frozen=True)
class RequestConfig:
    """How one request is decoded: nothing left to default."""

    strategy: str
    params: Params
    block_length: int
    """`sized` replaces 0, the whole canvas, by the request's canvas width."""
    sub_block_length: int
    """0, the whole block, is replaced by `sized` too."""
    cache: Cache
    steps: int | None
    """Over the whole canvas; None writes one token per step."""
    steps_per_block: int | None
    """Wins over `steps`."""
    reference_exact: bool

    def sized(self, max_tokens: int, max_canvas: int) -> RequestConfig:
        """With the lengths, in positions, that a request's output gives them."""
        length = self.block_length or min(max_tokens, max_canvas)
        sub = min(self.sub_block_length or length, length)
        return replace(self, block_length=length, sub_block_length=sub)


def server_config(vllm_config: Any) -> DlmConfig:
    """The options of a server, checked against its model's default strategy.

    Raises:
        ValueError: as `DlmConfig.from_mapping`.
    """
    additional = vllm_config.additional_config
    mapping = additional.get("dlm") if isinstance(additional, Mapping) else None
    config = DlmConfig.from_mapping(mapping or {}, where='additional_config["dlm"]')
    model_config = vllm_config.model_config
    if model_config is not None and hasattr(model_config.hf_config, "dlm_class"):
        defaults = ModelDefaults.from_hf_config(model_config.hf_config)
        resolved = resolve(config, None, defaults)
        limit = config.canvas_limit(model_config.max_model_len, defaults.max_canvas)
        if resolved.block_length > limit:
            raise ValueError(
                f"block_length {resolved.block_length} does not fit into a canvas of "
                f"{limit} positions; lower it or raise max_canvas"
            )
    return config


def served_config(hf_config: Any) -> DlmConfig:
    """The server's options as our config hook left them in `hf_config.dlm_server`."""
    stored = getattr(hf_config, "dlm_server", None)
    if isinstance(stored, DlmConfig):
        return stored
    return DlmConfig.model_validate(stored or {})


def resolve(
    server: DlmConfig, extra_args: Mapping[str, Any] | None, defaults: ModelDefaults
) -> RequestConfig:
    """Merge a request's options over the server's over the model's.

    Args:
        server: the server's options.
        extra_args: `SamplingParams.extra_args`. Read are `dlm` (a dict or JSON text)
            and keys that begin with `dlm_`: options and, as in `dlm_threshold`, the
            chosen strategy's parameters.
        defaults: the model's declarations.

    Raises:
        ValueError: unknown names, wrong types, values out of range, options that
            belong to the server; the message says what is valid.
    """
    options, flat_params = _request_options(extra_args or {})
    request = parse_options(
        options, where="the request's dlm options", valid=REQUEST_OPTIONS
    )
    server_strategy = server.strategy or defaults.strategy
    strategy = request.strategy or server_strategy
    # Parameters of one strategy mean nothing to another.
    params = dict(defaults.strategy_config) if strategy == defaults.strategy else {}
    params |= server.strategy_config if strategy == server_strategy else {}
    params |= request.strategy_config
    fields = STRATEGIES[strategy].Params.model_fields
    for name, value in flat_params.items():
        if name not in fields:
            valid = [PREFIX + option for option in (*REQUEST_OPTIONS, *fields)]
            raise ValueError(
                f"the request (strategy {strategy!r}): {unknown(PREFIX + name, valid)}"
            )
        if name in request.strategy_config:
            raise _set_twice(PREFIX + name, "strategy_config")
        params[name] = value
    for name in request.strategy_config.keys() | flat_params.keys():
        if name in fields and fields[name].json_schema_extra == SERVER_PARAMETER:
            raise ValueError(
                f"{name} of the strategy {strategy!r} is set by the server "
                "(--dlm-strategy-config); a request cannot change it"
            )
    is_set = request.model_fields_set
    block_length = request.block_length or server.block_length or defaults.block_length
    counts_steps = request if request.steps or request.steps_per_block else server
    config = RequestConfig(
        strategy=strategy,
        params=parse_params(strategy, params, where="strategy_config"),
        block_length=0 if block_length == WHOLE_CANVAS else int(block_length),
        sub_block_length=request.sub_block_length
        or server.sub_block_length
        or defaults.sub_block_length
        or 0,
        cache=request.cache if "cache" in is_set else server.cache,
        steps=counts_steps.steps,
        steps_per_block=counts_steps.steps_per_block,
        reference_exact=(
            request.reference_exact
            if "reference_exact" in is_set
            else server.reference_exact
        ),
    )
    if defaults.reuses_blocks:
        _check_block_causal(config, server.block_length or defaults.block_length)
    return config


def _check_block_causal(config: RequestConfig, trained: int | str) -> None:
    """What models that keep finished blocks' KV cannot do.

    Raises:
        ValueError: `config` asks for it.
    """
    if trained == WHOLE_CANVAS:
        raise ValueError(
            "block_length 'canvas' is for models with full attention; this one is "
            "block-causal: give the length its blocks were trained with"
        )
    if config.block_length != trained:
        raise ValueError(
            f"block_length is {trained} for all requests of this block-causal model: "
            "the KV of a prompt depends on it; only the server can change it "
            "(--dlm-block-length)"
        )
    if config.cache != "none":
        raise ValueError(
            f"cache {config.cache!r} is for models with full attention; this one is "
            "block-causal and keeps what is final in any case: leave it at 'none'"
        )


def parse_params(strategy: str, values: Mapping[str, Any], *, where: str) -> Params:
    """Validate a strategy's parameters.

    Raises:
        ValueError: unknown or wrong parameters; the message lists the valid ones.
    """
    params = STRATEGIES[strategy].Params
    where = f"{where} (strategy {strategy!r})"
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name not in params.model_fields:
            raise ValueError(f"{where}: {unknown(name, params.model_fields)}")
    for name in numeric_fields(params):
        if isinstance(given.get(name), bool):
            raise ValueError(f"{where}: {name}: expected a number, not a boolean")
    try:
        return params.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None


def parse_options(
    mapping: Any, *, where: str, valid: Iterable[str] = tuple(DlmConfig.model_fields)
) -> DlmConfig:
    """Validate options one by one, not yet a strategy's parameters.

    Args:
        mapping: option name -> value; None means "not set".
        where: names the source in error messages.
        valid: the options that may be set here.

    Raises:
        ValueError: as `DlmConfig.from_mapping`.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(
            f"{where}: expected a mapping of options, got {type(mapping).__name__}"
        )
    given = {name: value for name, value in mapping.items() if value is not None}
    for name in given:
        if name not in valid:
            strategy, hint = given.get("strategy"), ""
            if strategy in STRATEGIES:
                fields = STRATEGIES[str(strategy)].Params.model_fields
                if name in fields:
                    hint = (
                        f"It is a parameter of {strategy!r}: put it in strategy_config."
                    )
            raise ValueError(f"{where}: {unknown(name, valid, hint=hint)}")
    try:
        return DlmConfig.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None


def _request_options(
    extra_args: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A request's options, and the flat keys that must be strategy parameters."""
    nested = extra_args.get("dlm")
    if isinstance(nested, str):
        try:
            nested = json.loads(nested)
        except ValueError as error:
            raise ValueError(f"dlm: not valid JSON ({error})") from None
    if not isinstance(nested, Mapping | None):
        raise ValueError(
            "dlm: expected an object of options, as a dict or as JSON text, got "
            f"{type(nested).__name__}"
        )
    options = {str(name): value for name, value in (nested or {}).items()}
    params: dict[str, Any] = {}
    for key, value in extra_args.items():
        if not key.startswith(PREFIX) or value is None:
            continue
        name = key.removeprefix(PREFIX)
        if name in options:
            raise _set_twice(key, "dlm")
        (options if name in DlmConfig.model_fields else params)[name] = value
    for name in SERVER_ONLY:
        if options.get(name) is not None:
            raise ValueError(
                f"{name} is an option of the server (--dlm-{name.replace('_', '-')}); "
                f"a request may set: {', '.join(REQUEST_OPTIONS)}"
            )
    return options, params
