# SPDX-License-Identifier: Apache-2.0
"""Everything that a server or a request may set: the one list of options.

A server's options arrive as `additional_config["dlm"]` (flags, `LLM(dlm_*=...)` or a
plain dict), a request's as `SamplingParams.extra_args`; `request.py` merges them. What
follows from a field of `DlmConfig` alone: the flag and its help, the keyword argument
of `LLM`, the key in `extra_args`, and whether a request may set the option. One list is
one file, however long it grows.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from vllm_dlm import trajectories
from vllm_dlm.config.cache import POLICIES, Cache
from vllm_dlm.config.growth import GROWTHS, GrowthName
from vllm_dlm.config.model import DEFAULT_MAX_CANVAS
from vllm_dlm.config.validation import Names, foreign_hint, parse_policy, validated
from vllm_dlm.messages import OptionError
from vllm_dlm.option_types import BlockLength, Count, Number, Object, Stages
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, numeric_fields, parameter_names
from vllm_dlm.strategies.presets import PRESET, named

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EndOfText = Literal["off", "block", "token", "canvas"]
Frames = Literal["off", "writes", "text"]
DiffusionGemma = Literal["native", "stock", "engine"]

COMPILE = ("auto", "all", "none")
"""What the option `compile` may say instead of names of strategies."""

SERVER_PARAMETER: JsonDict = {"server_only": True}
"""`json_schema_extra` of an option, or of a strategy's parameter, that no request may
set (paths, say)."""

SERVER_FOLDER: JsonDict = {"server_only": True, "metavar": "FOLDER"}
"""The same, of an option that is a folder's path."""

LONGEST_REQUEST_BLOCK = 256
"""Longest block, in positions, that a request may ask for, unless the server's own are
longer.

A block takes a row of logits per position: memory that vLLM did not set aside when it
started.
"""

LARGEST_NUMBER = 1e18
"""Largest value of a strategy's numeric parameter, which the engine keeps as float32 or
int64."""


class DlmConfig(BaseModel):
    """Options of a server; a request may set those not in `SERVER_ONLY`.

    A field's `json_schema_extra` says what its type does not: "server_only", that no
    request may set the option, and "metavar", what a flag's help calls its value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: str | None = Field(
        default=None,
        json_schema_extra={"metavar": "NAME"},
        description="Decoding strategy: which masked positions are written in a step. "
        "`vllm-dlm strategies` lists them. Default: the model's own.",
    )
    strategy_config: Object = Field(
        default_factory=dict,
        description="The strategy's own parameters, as a JSON object; "
        "`vllm-dlm strategies NAME` lists them, and what `preset` may name.",
    )
    block_length: BlockLength | None = Field(
        default=None,
        description="Positions decoded together before the next block begins, from 1 "
        "to 1024, or `canvas`: the whole output is one block. Block-causal models are "
        "trained for one length, which only the server may change; for a strategy "
        "that decides several blocks together (multi_block), a request gives their "
        "length in all. Default: the model's own.",
    )
    sub_block_length: Count | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Positions of a block that may be written at a time, from the "
        "left; the whole block is computed all the same, unless `cache` is `dual` "
        "(Fast-dLLM v2). Default: the model's own, mostly the whole block.",
    )
    cache: Cache = Field(
        default="none",
        description="KV policy of models with full attention: `none` recomputes "
        "everything in each step and is exact. The others are faster and approximate: "
        "until the block is done, `prefix` keeps what is left of it, `dual` both sides "
        "(Fast-dLLM, arXiv 2505.22618), `vicinity` all but some positions around it "
        "(dInfer, 2510.08666); `window` computes the first masks and what was written "
        "lately, and sees some masks more (Window-Diffusion, 2601.20332). Of "
        "block-causal models with sub-blocks (Fast-dLLM v2, 2509.26328) `none`, or "
        "`dual`: a sub-block is computed alone once its first token is written "
        "(use_block_cache). "
        "docs/caches.md",
    )
    cache_config: Object = Field(
        default_factory=dict,
        description="The cache policy's own parameters, as a JSON object: of "
        "`vicinity` look_back, look_ahead, warmup_steps; of `window` active_window, "
        "external_window, refresh_every, early_stop.",
    )
    steps: Count | None = Field(
        default=None,
        ge=1,
        description="Denoise steps of a request over its whole canvas, spread evenly "
        "over its blocks, for strategies that follow a schedule: `vllm-dlm strategies "
        "NAME` says whether one does. A server's are for these alone; a request that "
        "sets them for another is refused. Default: one token per step.",
    )
    steps_per_block: Count | None = Field(
        default=None,
        ge=1,
        description="The same per block, as block-causal models' own code counts.",
    )
    eotp: EndOfText | None = Field(
        default=None,
        description="End-of-text prediction: as soon as the active block has an "
        "end-of-text token, written or predicted, drop the blocks after it (`block`), "
        "or all that is right of the token (`token`), or nothing (`off`). `canvas`, of "
        "models with full attention, is `block`, and looks right of the active block "
        "too: the blocks behind a predicted end are dropped from the first step on "
        "(Learn2PD, arXiv 2509.25188). Default: the strategy's own: `block` with "
        "learn2pd, else `off`.",
    )
    eotp_threshold: Number = Field(
        default=0.9,
        ge=0.0,
        le=2.0,
        description="Least probability of an end-of-text token that counts for `eotp` "
        "before it is written; above 1 only written ones do.",
    )
    growth: GrowthName = Field(
        default="none",
        description="Of models with full attention: begin with a short canvas, and let "
        "it grow while too little of it is the end of the text: `daedal` (arXiv "
        "2508.00819) by how sure its last ends are, `rho_eos` (2601.22527) by how many "
        "there are. `none`: the canvas is as wide as the output that is asked for.",
    )
    growth_config: Object = Field(
        default_factory=dict,
        description="The growth policy's own parameters, as a JSON object: initial, "
        "expansion, threshold; of `daedal` window too.",
    )
    tccf: Stages = Field(
        default=None,
        description="Think coarse, critic fine (TDAR, arXiv 2602.09555), of block-"
        "causal models: decode in blocks up to a `trigger` (`</think>`), write a "
        "`check` text behind it, and go on token by token. A JSON object of both, each "
        "a text or a list of token ids.",
    )
    reference_exact: bool = Field(
        default=False,
        description="Decode as the published reference code does, quirks included: the "
        "mask token may be predicted, and where that code measures confidence after "
        "temperature and top-k/p, so is it here. To compare with it, not to serve.",
    )
    step_map: bool = Field(
        default=False,
        description="Give each finished output its step map: per token the denoise "
        "step that wrote it, its log-probability in that step, and whether it was "
        "edited. Not for streamed requests.",
    )
    frames: Frames = Field(
        default="off",
        description="Show the canvas while it fills: between the chunks of a stream of "
        "/v1/completions or /v1/chat/completions come frames, a chunk with an empty "
        "delta per denoise step. `writes`: what changed on the canvas; `text`: the "
        "active block as text too. A server's setting is for all streams of these "
        "routes. docs/watching.md",
    )
    max_canvas: Count | None = Field(
        default=None,
        ge=1,
        json_schema_extra=SERVER_PARAMETER,
        description="Most positions a request's canvas may have at a time; longer "
        "outputs continue on a further canvas. Default: "
        f"the model's own, or {DEFAULT_MAX_CANVAS}, at most the context length.",
    )
    commit: Literal["fused", "separate"] = Field(
        default="fused",
        json_schema_extra=SERVER_PARAMETER,
        description="Of block-causal models: when a finished block's keys and values "
        "are written for good. `fused`: in the next block's first step, at no forward "
        "of their own. `separate`: by one forward more per block, as other engines do; "
        "the same tokens, to measure what the difference is.",
    )
    compile: str = Field(
        default="auto",
        json_schema_extra={"server_only": True, "metavar": "WHAT"},
        description="Whose steps are compiled into a few kernels: `auto`, those of the "
        "server's own strategy and parameters, when the engine starts, unless it runs "
        "with --enforce-eager; names of strategies, separated by commas, those with "
        "their default parameters too, and in any case; `all`, every strategy when it "
        "is first asked for, while others wait for seconds; `none`. What is not "
        "compiled decodes the same texts, in more time per step.",
    )
    async_blocks: Count = Field(
        default=1,
        ge=1,
        le=2,
        json_schema_extra=SERVER_PARAMETER,
        description="Of block-causal models without leads, scheduled asynchronously: "
        "blocks that a step computes if it is scheduled before the outcome of the last "
        "one. With 1, a finished block takes a forward of its own; with 2, the next "
        "block is computed along in every step, in vain until it is its turn.",
    )
    soft_inputs: bool = Field(
        default=False,
        json_schema_extra=SERVER_PARAMETER,
        description="Make the input embeddings of each forward outside the network, so "
        "that strategies may feed mixtures of tokens (dmax, smooth). It costs every "
        "request a little: without it these strategies are refused. On in any case "
        "for models that need it.",
    )
    online_learning: bool = Field(
        default=True,
        json_schema_extra=SERVER_PARAMETER,
        description="Let strategies with a learned part (learn2pd) learn in the "
        "background from finished requests; no text is stored.",
    )
    filter_dir: str | None = Field(
        default=None,
        json_schema_extra=SERVER_FOLDER,
        description="Folder where learned filters are kept. Default: "
        "vllm-dlm/filters in $XDG_CACHE_HOME or ~/.cache.",
    )
    record_traces: bool = Field(
        default=False,
        json_schema_extra=SERVER_PARAMETER,
        description="Keep confidences of finished requests in memory, whatever their "
        "strategy; `vllm-dlm traces` reads them. No text is kept.",
    )
    trajectory_dir: str | None = Field(
        default=None,
        json_schema_extra=SERVER_FOLDER,
        description="Folder for a log of every step of every request, prompts and "
        "texts included; `vllm_dlm.trajectories.read` reads it. Default: no log.",
    )

    diffusion_gemma: DiffusionGemma = Field(
        default="native",
        json_schema_extra=SERVER_PARAMETER,
        description="Of DiffusionGemma alone: `native`, vLLM's own code, with its keys "
        "of finished canvases and its layer scalars as published (vLLM's own differ "
        "there); `stock`, vLLM's code as it is; `engine`, this package's engine and "
        "the strategy renoise, for text alone.",
    )

    @model_validator(mode="after")
    def _count_steps_once(self) -> Self:
        if self.steps and self.steps_per_block:
            raise ValueError("set steps or steps_per_block, not both")
        return self

    @field_validator("compile")
    @classmethod
    def _check_compile(cls, what: str) -> str:
        names = [name.strip() for name in what.split(",")]
        unknown = [name for name in names if name not in STRATEGIES]
        if what not in COMPILE and unknown:
            raise ValueError(
                f"{unknown[0]!r} is neither one of {', '.join(COMPILE)} nor a "
                f"strategy; the strategies are {', '.join(STRATEGIES)}"
            )
        return ",".join(names)

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
        parse_policy("cache", POLICIES, config.cache, config.cache_config, where=where)
        parse_policy(
            "growth", GROWTHS, config.growth, config.growth_config, where=where
        )
        if config.trajectory_dir is not None:
            trajectories.check_folder(config.trajectory_dir, where=where)
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

    def compiled_strategies(self) -> list[str]:
        """Names of strategies that the option `compile` lists."""
        return [] if self.compile in COMPILE else self.compile.split(",")

    def strategy_options(self) -> dict[str, Any]:
        """`Context.options` of the strategies that this server builds."""
        return {
            "filter_dir": str(self.filters_path()),
            "online_learning": self.online_learning,
        }


def is_server_only(field: FieldInfo) -> bool:
    """Whether no request may set an option, or a strategy's parameter."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("server_only"))


SERVER_ONLY = tuple(
    name for name, field in DlmConfig.model_fields.items() if is_server_only(field)
)
"""The options that a request cannot change."""

REQUEST_OPTIONS = tuple(
    name for name in DlmConfig.model_fields if name not in SERVER_ONLY
)
"""The options that a request may set."""


def served_config(hf_config: PretrainedConfig) -> DlmConfig:
    """The server's options as our config hook left them in `hf_config.dlm_server`."""
    stored = getattr(hf_config, "dlm_server", None)
    if isinstance(stored, DlmConfig):
        return stored
    return DlmConfig.model_validate(stored or {})


def parse_params(
    strategy: str, values: Mapping[str, Any], *, where: str, names: Names | None = None
) -> Params:
    """Validate a strategy's parameters.

    Args:
        strategy: whose they are.
        values: parameter -> value; None means "not set".
        where: names the source in error messages.
        names: of those that were set under another name.

    Raises:
        ValueError: unknown or wrong parameters; the message lists the valid ones.
    """

    def hint(name: str) -> str:
        if name in DlmConfig.model_fields:
            return "It is an option of every strategy: put it beside strategy_config."
        return foreign_hint(name)

    kind, names = STRATEGIES[strategy].Params, names or {}
    where = f"{where} (strategy {strategy!r})"
    numbers = numeric_fields(kind)
    preset = values.get(PRESET) if kind.presets else None
    if preset is not None:
        set_as = names.get(PRESET, PRESET)
        try:
            named(kind.presets, preset)
        except ValueError as error:
            raise OptionError(f"{where}: {set_as}: {error}", set_as) from None
    parsed = validated(
        kind,
        values,
        where=where,
        valid=parameter_names(kind),
        numbers=numbers,
        names=names,
        hint=hint,
    )
    for name in numbers:
        if abs(getattr(parsed, name)) > LARGEST_NUMBER:
            set_as = names.get(name, name)
            raise OptionError(
                f"{where}: {set_as}: at most {LARGEST_NUMBER:g} is accepted", set_as
            )
    return parsed


def parse_options(
    mapping: Any,
    *,
    where: str,
    valid: Collection[str] = tuple(DlmConfig.model_fields),
    names: Names | None = None,
) -> DlmConfig:
    """Validate options one by one, not yet a strategy's parameters.

    Args:
        mapping: option name -> value; None means "not set".
        where: names the source in error messages.
        valid: the options that may be set here.
        names: of those that were set under another name.

    Raises:
        ValueError: as `DlmConfig.from_mapping`.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(
            f"{where}: expected a mapping of options, got {type(mapping).__name__}"
        )

    def hint(name: str) -> str:
        strategy = mapping.get("strategy")
        known = strategy in STRATEGIES
        if known and name in parameter_names(STRATEGIES[str(strategy)].Params):
            return f"It is a parameter of {strategy!r}: put it in strategy_config."
        return foreign_hint(name)

    return validated(
        DlmConfig, mapping, where=where, valid=valid, names=names, hint=hint
    )
