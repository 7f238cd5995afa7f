# SPDX-License-Identifier: Apache-2.0
"""How one request is decoded: its options over the server's over the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_dlm.admission.stray_options import refuse_unread
from vllm_dlm.config.cache import Cache, CachePolicy, Reach
from vllm_dlm.config.foreign_names import advice, clause, plain
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import (
    PREFIX,
    REQUEST_OPTIONS,
    SERVER_ONLY,
    SERVER_PARAMETER,
    DlmConfig,
    EndOfText,
    parse_options,
    parse_params,
    parse_policy,
)
from vllm_dlm.messages import (
    LONGEST_QUOTE,
    OptionError,
    name_of,
    quote,
    unknown,
    with_parameters,
)
from vllm_dlm.option_bounds import check_size
from vllm_dlm.option_types import WHOLE_CANVAS, ThinkCoarse, read_json
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params

MOST_KEYS = 256
"""Of a request's `extra_args`, that are ours: far more than there are options."""


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
    cache_policy: CachePolicy
    reads_block: bool
    """Positions that are decided are read too, or rewritten."""
    steps: int | None
    """Over the whole canvas; None writes one token per step."""
    steps_per_block: int | None
    """Wins over `steps`."""
    eotp: EndOfText
    eotp_threshold: float
    tccf: ThinkCoarse | None
    reference_exact: bool
    step_map: bool

    def sized(self, max_tokens: int, max_canvas: int) -> RequestConfig:
        """With the lengths, in positions, that a request's output gives them."""
        length = self.block_length or min(max_tokens, max_canvas)
        sub = min(self.sub_block_length or length, length)
        return replace(self, block_length=length, sub_block_length=sub)

    @property
    def follows_schedule(self) -> bool:
        """Whether its strategy follows the step schedule."""
        return STRATEGIES[self.strategy].follows_schedule(self.params)

    def reach(self, shift: int) -> Reach:
        """What its cache policy computes, of a model with this shift; if `sized`."""
        left = 0 if self.opens_alone else shift
        return self.cache_policy.reach(left, self.reads_block, self.sub_block_length)

    @property
    def opens_alone(self) -> bool:
        """With a shift: a block's first step writes its first token alone."""
        return self.reference_exact and self.cache_policy.opens_alone


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
            bound = "max_canvas"
            if limit == model_config.max_model_len:
                bound = "--max-model-len, the context length"
            raise ValueError(
                f"block_length {resolved.block_length} does not fit into a canvas of "
                f"{limit} positions; lower it or raise {bound}"
            )
    return config


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
    options, flat_params, names = _request_options(extra_args or {})
    where = "the request's dlm options"
    request = parse_options(options, where=where, valid=REQUEST_OPTIONS, names=names)
    server_strategy = server.strategy or defaults.strategy
    strategy = request.strategy or server_strategy
    # Parameters of one strategy mean nothing to another.
    params = dict(defaults.strategy_config) if strategy == defaults.strategy else {}
    params |= server.strategy_config if strategy == server_strategy else {}
    params |= request.strategy_config
    fields = STRATEGIES[strategy].Params.model_fields
    for name, value in flat_params.items():
        if name not in fields:
            raise _unknown_key(PREFIX + name, strategy)
        if name in request.strategy_config:
            raise _set_twice(PREFIX + name, "strategy_config")
        params[name] = value
    set_as = {
        name: f"{names['strategy_config']}.{name}"
        for name in fields
        if name in request.strategy_config
    }
    set_as |= {name: PREFIX + name for name in flat_params}
    for name in set_as:
        if fields[name].json_schema_extra == SERVER_PARAMETER:
            raise OptionError(
                f"{set_as[name]}: {name} of the strategy {strategy!r} is set by the "
                "server (--dlm-strategy-config); a request cannot change it",
                set_as[name],
            )
    is_set = request.model_fields_set
    block_length = request.block_length or _own_block_length(strategy, server, defaults)
    rule = STRATEGIES[strategy]
    cache = request.cache if "cache" in is_set else server.cache
    # Parameters of one policy mean nothing to another.
    cache_config = server.cache_config if cache == server.cache else {}
    cache_config = {**cache_config, **request.cache_config}
    parsed_params = parse_params(strategy, params, where="the request", names=set_as)
    steps = _steps(request, server, strategy, parsed_params, names)
    config = RequestConfig(
        strategy=strategy,
        params=parsed_params,
        block_length=0 if block_length == WHOLE_CANVAS else int(block_length),
        sub_block_length=request.sub_block_length
        or server.sub_block_length
        or defaults.sub_block_length
        or 0,
        cache=cache,
        cache_policy=parse_policy(
            cache, cache_config, where="the request", names=names
        ),
        # Traces teach a strategy that reads whole blocks.
        reads_block=rule.logit_rows == "block"
        or rule.may_rewrite
        or server.record_traces,
        **steps,
        eotp=request.eotp or server.eotp or rule.eotp,
        eotp_threshold=(
            request.eotp_threshold
            if "eotp_threshold" in is_set
            else server.eotp_threshold
        ),
        tccf=request.tccf or server.tccf,
        reference_exact=(
            request.reference_exact
            if "reference_exact" in is_set
            else server.reference_exact
        ),
        step_map=request.step_map if "step_map" in is_set else server.step_map,
    )
    # A request that says `off` itself is not misunderstood.
    if "eotp_threshold" in is_set and not request.eotp and config.eotp == "off":
        raise OptionError(
            f"{names['eotp_threshold']} would be ignored: eotp is 'off'; set it to "
            "'block' or 'token', or leave the threshold out",
            names["eotp_threshold"],
        )
    if defaults.reuses_blocks:
        _check_block_causal(config, server.block_length or defaults.block_length)
    elif config.tccf is not None:
        raise ValueError(
            "tccf is for block-causal models: with full attention, shorter blocks are "
            "not finer; leave it out"
        )
    return config


def _steps(
    request: DlmConfig,
    server: DlmConfig,
    strategy: str,
    params: Params,
    set_as: Mapping[str, str],
) -> dict[str, int | None]:
    """The options of the step schedule: a request's, or the server's.

    A server's are for all its strategies that follow a schedule.

    Args:
        request, server: their options.
        strategy, params: what the request is decoded by.
        set_as: option -> the name that the request set it under.

    Raises:
        ValueError: the request sets one for a strategy that follows none.
    """
    names = ("steps", "steps_per_block")
    asked = [name for name in names if getattr(request, name) is not None]
    if STRATEGIES[strategy].follows_schedule(params):
        source = request if asked else server
        return {name: getattr(source, name) for name in names}
    if asked:
        raise OptionError(
            f"{set_as[asked[0]]} would be ignored: the strategy {strategy!r} follows "
            f"no step schedule. Those that do: {', '.join(scheduled_strategies())}",
            set_as[asked[0]],
        )
    return dict.fromkeys(names)


def scheduled_strategies() -> list[str]:
    """The strategies that follow the step schedule, and with which parameters."""
    found = []
    for name in STRATEGIES:
        schedule = STRATEGIES[name].schedule
        if isinstance(schedule, Mapping):
            found.append(f"{name} with {with_parameters(schedule)}")
        elif schedule:
            found.append(name)
    return found


def _own_block_length(
    strategy: str, server: DlmConfig, defaults: ModelDefaults
) -> int | str:
    """The block length of a request that does not say one."""
    if STRATEGIES[strategy].scope == "canvas" and not defaults.reuses_blocks:
        # A length that the server was given for another strategy says nothing here.
        own = server.block_length if server.strategy == strategy else None
        return own or WHOLE_CANVAS
    return server.block_length or defaults.block_length


def _check_block_causal(config: RequestConfig, trained: int | str) -> None:
    """What models that keep finished blocks' KV cannot do.

    Raises:
        ValueError: `config` asks for it.
    """
    if STRATEGIES[config.strategy].scope == "canvas":
        served = [name for name in STRATEGIES if STRATEGIES[name].scope == "block"]
        raise ValueError(
            f"the strategy {config.strategy!r} decides over the whole output at once, "
            "which needs full attention; this model is block-causal. It serves: "
            f"{', '.join(served)}"
        )
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
    if config.cache not in ("none", "dual"):
        raise ValueError(
            f"cache {config.cache!r} is for models with full attention; this one is "
            "block-causal and keeps what is final in any case: leave it at 'none', or "
            "set 'dual' if its blocks are written in sub-blocks"
        )
    has_parts = 0 < config.sub_block_length < config.block_length
    if config.cache == "dual" and not has_parts:
        raise ValueError(
            "cache 'dual' of a block-causal model computes sub-blocks alone, and its "
            f"blocks of {config.block_length} have none here: leave it at 'none', or "
            f"set sub_block_length below {config.block_length}"
        )


def _request_options(
    extra_args: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """A request's options, and the flat keys that must be strategy parameters.

    And option -> the name that the request set it under.
    """
    read = {
        key: value
        for key, value in extra_args.items()
        if key == "dlm" or str(key).startswith(PREFIX)
    }
    if len(read) > MOST_KEYS:
        raise OptionError(f"{len(read)} keys begin with dlm; at most {MOST_KEYS} do")
    if len(read) < len(extra_args):
        others = (key for key in extra_args if key not in read)
        refuse_unread(key for key in others if extra_args[key] is not None)
    for key, value in read.items():
        check_size(name_of(key), value)
    try:
        nested = read_json(read.pop("dlm", None))
    except ValueError as error:
        raise OptionError(f"dlm: {error}", "dlm") from None
    if not isinstance(nested, Mapping | None):
        raise OptionError(
            "dlm: expected an object of options, as a dict or as JSON text, got "
            f"{type(nested).__name__}",
            "dlm",
        )
    options = {str(name): value for name, value in (nested or {}).items()}
    names = {name: f"dlm.{name}" for name in DlmConfig.model_fields}
    params: dict[str, Any] = {}
    for key, value in read.items():
        if value is None:
            continue
        name = key.removeprefix(PREFIX)
        if name in options:
            raise _set_twice(key, "dlm")
        if name in DlmConfig.model_fields:
            options[name], names[name] = value, key
        else:
            params[name] = value
    for name in SERVER_ONLY:
        if options.get(name) is not None:
            flag = f"--dlm-{name.replace('_', '-')}"
            raise OptionError(
                f"{names[name]} is an option of the server ({flag}); a request may "
                f"set: {', '.join(REQUEST_OPTIONS)}",
                names[name],
            )
    return options, params, names


def _unknown_key(key: str, strategy: str) -> OptionError:
    """A flat key that is neither an option nor a parameter of the strategy."""
    fields = STRATEGIES[strategy].Params.model_fields
    valid = [PREFIX + option for option in (*REQUEST_OPTIONS, *fields)]
    found = advice(plain(key[:LONGEST_QUOTE]))
    hint = f"Here it is: {clause(found)}." if found else ""
    return OptionError(
        f"the request (strategy {strategy!r}): {unknown(key, valid, hint=hint)}", key
    )


def _set_twice(key: str, other: str) -> OptionError:
    return OptionError(
        f"{quote(key)} is also set in {other!r}; set it in one place", key
    )
