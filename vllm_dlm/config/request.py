# SPDX-License-Identifier: Apache-2.0
"""How one request is decoded: its own options win over the server's, those over the
model's (`levels.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_dlm.config.block_causal import (
    check_ahead,
    check_block_causal,
    check_verifying,
)
from vllm_dlm.config.cache import POLICIES, Cache, CachePolicy, Reach
from vllm_dlm.config.canvas import (
    SOURCES,
    Canvas,
    CanvasBuilder,
    check_combination,
    refuse_without_canvas,
)
from vllm_dlm.config.elastic import as_published, check_elastic
from vllm_dlm.config.growth import GROWTHS, GrowthName, GrowthPolicy
from vllm_dlm.config.lengths import (
    block_length_of,
    end_of_text,
    first_set,
    steps_of,
)
from vllm_dlm.config.levels import folder_options, over, over_folder
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.noise import check_noise
from vllm_dlm.config.options import (
    DlmConfig,
    EndOfText,
    Frames,
    parse_params,
)
from vllm_dlm.config.request_options import RequestOptions, read_request
from vllm_dlm.config.validation import Model, parse_policy
from vllm_dlm.messages import OptionError
from vllm_dlm.option_types import WHOLE_CANVAS, ThinkCoarse
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params

if TYPE_CHECKING:
    from vllm.config import VllmConfig


NO_PREDICTION = 2.0
"""A confidence that no prediction has."""


@dataclass(frozen=True)
class RequestConfig:
    """How one request is decoded, with every option decided."""

    strategy: str
    params: Params
    block_length: int
    """Positions of a block; 0 for the whole canvas, until `sized` knows its width."""
    attended_length: int
    """Positions of a block as the model's attention has it, where finished blocks are
    final: then `block_length` may be several of these, decided together. 0 for the
    whole block, until `sized` knows its length."""
    sub_block_length: int
    """Positions written at a time; 0 for the whole block, until `sized` knows its
    length."""
    cache: Cache
    cache_policy: CachePolicy
    reads_block: bool
    """The strategy reads decided positions too, or rewrites them."""
    steps: int | None
    """Denoise steps over the whole canvas; None writes one token per step."""
    steps_per_block: int | None
    """Denoise steps of a block; wins over `steps`."""
    looks_ahead: int
    """Positions behind the active block that a forward may write too, at least."""
    eotp: EndOfText
    eotp_threshold: float
    growth: GrowthName
    growth_policy: GrowthPolicy
    tccf: ThinkCoarse | None
    reference_exact: bool
    step_map: bool
    frames: Frames
    canvas: Canvas | None = None
    """What the request has brought; None for masks alone."""

    def sized(self, max_tokens: int, max_canvas: int) -> RequestConfig:
        """This configuration with block lengths in positions.

        Args:
            max_tokens: of the request.
            max_canvas: most positions of a canvas.
        """
        if self.canvas is not None:
            max_tokens = self.canvas.width
        length = self.block_length or min(max_tokens, max_canvas)
        sub = self.sub_block_length or length
        if not self.verifies:
            sub = min(sub, length)
        return replace(
            self,
            block_length=length,
            attended_length=self.attended_length or length,
            sub_block_length=sub,
        )

    @property
    def window(self) -> int:
        """Positions that are decided together, if `sized`: whole blocks."""
        length = self.block_length
        return -(-(length + self.looks_ahead) // length) * length

    @property
    def verifies(self) -> bool:
        """Whether its strategy drafts, and then verifies (`Strategy.verifies`)."""
        return STRATEGIES[self.strategy].verifies

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


def server_config(vllm_config: VllmConfig) -> DlmConfig:
    """The options of a server over its model's, checked against the default strategy.

    Raises:
        ValueError: as `DlmConfig.from_mapping`.
    """
    additional = vllm_config.additional_config
    mapping = additional.get("dlm") if isinstance(additional, Mapping) else None
    config = DlmConfig.from_mapping(mapping or {}, where='additional_config["dlm"]')
    model_config = vllm_config.model_config
    if model_config is not None and hasattr(model_config.hf_config, "dlm_class"):
        defaults = ModelDefaults.from_hf_config(model_config.hf_config)
        config = over_folder(config, folder_options(model_config.hf_config))
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
    server: DlmConfig,
    extra_args: Mapping[str, Any] | None,
    defaults: ModelDefaults,
    build_canvas: CanvasBuilder | None = None,
) -> RequestConfig:
    """Merge a request's options over the server's over the model's.

    Args:
        server: the server's options.
        extra_args: `SamplingParams.extra_args`. Read are `dlm` (a dict or JSON text)
            and keys that begin with `dlm_`: options and, as in `dlm_threshold`, the
            chosen strategy's parameters.
        defaults: the model's declarations.
        build_canvas: makes a canvas of a request's options, which takes a tokenizer:
            in the process that admits the request.

    Raises:
        ValueError: unknown names, wrong types, values out of range, options that
            belong to the server; the message says what is valid.
    """
    asked = read_request(extra_args)
    request = asked.options
    refuse_without_canvas(asked.canvas, asked.names)
    is_elastic = asked.canvas.holes == "elastic"
    if is_elastic:
        server = as_published(asked, server, defaults)
    strategy = request.strategy or server.strategy or defaults.strategy
    rule = STRATEGIES[strategy]
    params = _params(asked, server, defaults, strategy)
    steps, steps_per_block = steps_of(asked, server, strategy, params)
    cache, cache_policy = _policy("cache", POLICIES, asked, server)
    eotp, eotp_threshold = end_of_text(asked, server, strategy)
    if cache_policy.stops_early and eotp == "off":
        # By what is written, not by what is predicted.
        eotp, eotp_threshold = "token", NO_PREDICTION
    growth, growth_policy = _policy("growth", GROWTHS, asked, server)
    trained = server.block_length or defaults.block_length
    spans = rule.scope == "blocks" and defaults.reuses_blocks
    length = block_length_of(asked, server, defaults, strategy)
    looks_ahead = check_ahead(strategy, params, defaults)
    tccf = request.tccf or server.tccf
    reference_exact = first_set("reference_exact", asked, server).reference_exact
    step_map = first_set("step_map", asked, server).step_map
    # What looks at every step of a block would find that of another one.
    logs = server.record_traces or server.trajectory_dir
    brings_canvas = any(getattr(asked.canvas, name) is not None for name in SOURCES)
    if step_map or reference_exact or tccf or eotp != "off" or logs or brings_canvas:
        looks_ahead = 0
    config = RequestConfig(
        strategy=strategy,
        params=params,
        block_length=length,
        attended_length=int(trained) if spans and trained != WHOLE_CANVAS else 0,
        sub_block_length=request.sub_block_length
        or server.sub_block_length
        or defaults.sub_block_length
        or 0,
        cache=cache,
        cache_policy=cache_policy,
        # Traces teach a strategy that reads whole blocks.
        reads_block=rule.logit_rows == "block"
        or rule.may_rewrite
        or server.record_traces,
        steps=steps,
        steps_per_block=steps_per_block,
        looks_ahead=looks_ahead,
        eotp=eotp,
        eotp_threshold=eotp_threshold,
        growth=growth,
        growth_policy=growth_policy,
        tccf=tccf,
        reference_exact=reference_exact,
        step_map=step_map,
        frames=first_set("frames", asked, server).frames,
    )
    check_noise(
        strategy,
        defaults,
        {
            "reference_exact": reference_exact,
            "eotp": eotp != "off",
            "tccf": tccf is not None,
            "sub_block_length": config.sub_block_length != 0,
            "growth": growth != "none",
            "record_traces": server.record_traces,
            "trajectory_dir": server.trajectory_dir is not None,
            # In which holes are marked with the mask id.
            "canvas": asked.canvas.canvas is not None,
        },
        asked.names,
    )
    if growth != "none":
        _check_growth(config, asked, defaults)
    if defaults.reuses_blocks:
        if eotp == "canvas":
            raise OptionError(
                f"{asked.names.get('eotp', 'eotp')} 'canvas' is for models with full "
                "attention: this model computes nothing right of the active block; "
                "use 'off', 'block' or 'token'",
                asked.names.get("eotp", "eotp"),
            )
        check_block_causal(
            strategy,
            cache,
            defaults,
            block_length=config.block_length,
            sub_block_length=config.sub_block_length,
            trained=trained,
        )
        if spans and config.tccf is not None:
            raise ValueError(
                f"tccf cannot be combined with the strategy {strategy!r}, which "
                "decides several blocks together: leave one of them out"
            )
    if rule.verifies:
        check_verifying(
            strategy,
            defaults,
            {
                "reference_exact": reference_exact,
                "step_map": step_map,
                "eotp": eotp != "off",
                "tccf": tccf is not None,
                "cache": cache != "none",
                "sub_block_length": config.sub_block_length not in (0, length),
            },
        )
        # Its text is that of blocks of one token.
        config = replace(
            config, block_length=1, sub_block_length=length, looks_ahead=length - 1
        )
    if config.tccf is not None and not defaults.reuses_blocks:
        raise ValueError(
            "tccf is for block-causal models: with full attention, shorter blocks are "
            "not finer; leave it out"
        )
    if is_elastic:
        by_place = {"step_map": step_map, "frames": config.frames != "off"}
        check_elastic(asked, server, by_place)
    if brings_canvas:
        combined = {
            "growth": growth != "none",
            "tccf": tccf is not None,
            "reference_exact": reference_exact,
        }
        check_combination(asked.canvas, asked.names, strategy, rule.verifies, combined)
        if build_canvas is None:
            raise ValueError(
                "a canvas is read where a request is admitted: send the request to the "
                "HTTP server, or to LLM"
            )
        config = replace(config, canvas=build_canvas(asked.canvas, asked.names))
    return config


def _params(
    asked: RequestOptions, server: DlmConfig, defaults: ModelDefaults, strategy: str
) -> Params:
    """The parameters of a request's strategy.

    Parameters of one strategy mean nothing to another: the model's and the server's
    count only for the strategy that they were set for.
    """
    own, set_as = asked.own_params(strategy)
    params: dict[str, Any] = {**defaults.other_strategies.get(strategy, {})}
    if strategy == defaults.strategy:
        params = over(strategy, params, defaults.strategy_config)
    if strategy == (server.strategy or defaults.strategy):
        params = over(strategy, params, server.strategy_config)
    params = over(strategy, params, own)
    return parse_params(strategy, params, where="the request", names=set_as)


def _policy(
    option: str,
    kinds: Mapping[Any, type[Model]],
    asked: RequestOptions,
    server: DlmConfig,
) -> tuple[Any, Model]:
    """A policy's name and the policy; its parameters mean nothing to another one.

    Args:
        option, kinds: as `parse_policy` takes them.
    """
    config = f"{option}_config"
    name = getattr(first_set(option, asked, server), option)
    values = getattr(server, config) if name == getattr(server, option) else {}
    values = {**values, **getattr(asked.options, config)}
    where = "the request"
    return name, parse_policy(
        option, kinds, name, values, where=where, names=asked.names
    )


def _check_growth(
    config: RequestConfig, asked: RequestOptions, defaults: ModelDefaults
) -> None:
    """Refuse a canvas that grows where none can."""
    set_as = asked.names.get("growth", "growth")
    where = f"{set_as} {config.growth!r}"
    if defaults.reuses_blocks:
        why = (
            "is for models with full attention: this model computes nothing right of "
            "the active block"
        )
    elif config.block_length == 0:
        why = (
            "adds blocks, and here the whole output is one block: set block_length to "
            "a number"
        )
    elif config.cache_policy.counts_masks:
        why = (
            f"looks at the whole canvas, of which cache {config.cache!r} leaves out "
            "what is far: choose another cache"
        )
    elif config.sub_block_length:
        why = "does not work with sub_block_length: leave that out"
    else:
        return
    raise OptionError(f"{where} {why}, or growth to 'none'", set_as)
