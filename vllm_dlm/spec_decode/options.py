# SPDX-License-Identifier: Apache-2.0
"""What a user may say about each of our speculative methods; validated here, once.

A user's dict (`--speculative-config`, `LLM(speculative_config=...)`) has vLLM's own
keys "method", "model", "num_speculative_tokens", and a method's own beside them.
No vLLM import: the front end turns options into vLLM's terms (`front_end.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from vllm_dlm.messages import explain, quote, unknown
from vllm_dlm.option_types import Count, Number

MAX_DRAFT = 128
"""Tokens; vLLM's rejection sampler takes no longer drafts (`MAX_SPEC_LEN`)."""

REQUEST_KEY = "dlm_draft_tokens"
"""Key of a request's own limit in `extra_args` (HTTP: `vllm_xargs`); 0: no drafts."""


class Options(BaseModel):
    """What all methods share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    summary: ClassVar[str]
    paper: ClassVar[str]
    proposer: ClassVar[str]
    """`module:class` of what faces vLLM's model runner V1."""
    speculator: ClassVar[str | None] = None
    """The same for model runner V2, if the method runs there."""
    why_not_v2: ClassVar[str] = ""
    """Why it does not, for the user."""
    vllm_method: ClassVar[str] = "draft_model"
    """The method of vLLM's in whose place the drafter stands; or "custom_class"."""
    attaches_probs: ClassVar[bool] = True
    """Whether drafts are verified against what they were drawn from, at temperature >
    0; else as point masses."""

    num_speculative_tokens: Count = Field(
        default=8,
        ge=1,
        le=MAX_DRAFT,
        description="Most tokens that one draft may have.",
    )


class WithDrafter(Options):
    """A method whose drafter is a model of its own."""

    model: str = Field(
        min_length=1, description="The drafter: folder, hub id or alias."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of the drafter on the hub."
    )
    quantization: str | None = Field(
        default=None, description="Quantization of the drafter, as vLLM takes it."
    )
    draft_tensor_parallel_size: Count | None = Field(
        default=None, ge=1, description="As vLLM takes it: the target's, or nothing."
    )


class Deer(WithDrafter):
    """A diffusion model drafts a block in one denoising step."""

    summary = "a diffusion language model drafts a block in one denoising step"
    paper = "DEER, arXiv 2512.15176 (a reconstruction: no code is public)"
    proposer = "vllm_dlm.spec_decode.deer.proposer:DeerProposer"
    speculator = "vllm_dlm.spec_decode.deer.speculator:DeerSpeculator"

    num_speculative_tokens: Count | None = Field(  # type: ignore[assignment]
        default=None,
        ge=1,
        le=MAX_DRAFT,
        description="Masks behind the text, all drafted at once. Default: as many as "
        "the drafter was trained for, its dlm_draft_length or the length of its "
        "blocks.",
    )
    context: Literal["auto", "recompute", "cached"] = Field(
        default="auto",
        description="How the drafter sees the text before its masks: computed anew in "
        "each round, or kept in the KV cache, which is exact only where the text does "
        "not see the masks (block-causal drafters). auto: cached where that is exact.",
    )


class SpecDecPlusPlus(WithDrafter):
    """A draft model drafts until a head expects a rejection."""

    summary = "a small model drafts until a trained head expects a rejection"
    paper = "SpecDec++, arXiv 2405.19715"
    proposer = "vllm_dlm.spec_decode.specdec_pp.proposer:SpecDecPlusPlusProposer"
    why_not_v2 = "it steers V1's draft model token by token, which V2 runs as a whole"

    num_speculative_tokens: Count = Field(
        default=20,
        ge=1,
        le=MAX_DRAFT,
        description="Most tokens that one draft may have.",
    )
    head: str | None = Field(
        default=None,
        min_length=1,
        description="File or folder of the acceptance head. Default: specdec/"
        "specdec_head.safetensors in the drafter's folder; `vllm-dlm train "
        "specdec-head` makes it.",
    )
    stop_threshold: Number = Field(
        default=0.7,
        gt=0,
        lt=1,
        description="Drafting stops when a rejection is more probable than this.",
    )
    min_tokens: Count = Field(
        default=2, ge=1, le=MAX_DRAFT, description="Tokens drafted before it may stop."
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min_tokens > self.num_speculative_tokens:
            raise ValueError(
                f"min_tokens {self.min_tokens} is more than num_speculative_tokens "
                f"{self.num_speculative_tokens}"
            )
        return self


class Del(Options):
    """The target's own lower layers draft; which ones and how far is learned."""

    summary = "the model's own lower layers draft; exit and length adapt to the text"
    paper = "DEL, arXiv 2504.05598"
    proposer = "vllm_dlm.spec_decode.del_exit.proposer:DelProposer"
    why_not_v2 = (
        "it reads the target's layers between steps, which V2's whole CUDA graphs hide"
    )
    # Its stop rule looks at the token that it may drop: lossless only without.
    attaches_probs = False

    num_speculative_tokens: Count = Field(
        default=18,
        ge=1,
        le=MAX_DRAFT,
        description="Most tokens that one draft may have.",
    )
    exits: list[Count] | None = Field(
        default=None,
        min_length=1,
        description="Layers after which a draft may exit, 1 to the number of layers "
        "less 1. Each costs a pass through lm_head per verified token. Default: up to "
        "8, evenly spaced.",
    )
    decay: Number = Field(
        default=0.95, gt=0, le=1, description="Of older statistics, per round."
    )
    stop: Literal["confidence", "length", "both", "gain"] = Field(
        default="confidence",
        description="What ends a draft: a token that its exit is not sure of, as in "
        "the public code; the length that was chosen with the exit; whichever of both "
        "comes first; or that one more token would not be worth its layers, given how "
        "sure the exit is of the draft so far.",
    )
    statistics: Literal["request", "shared"] = Field(
        default="request",
        description="Whether each request learns its own exit, or all learn one, "
        "which is better where texts are short. Then drafts depend on neighbours, and "
        "with them what a seed draws at temperature > 0.",
    )


class Aded(Options):
    """Tri-grams draft; a tree search picks the chain."""

    summary = "tri-grams of a corpus and of served texts draft; no model is needed"
    paper = "ADED, arXiv 2407.12021"
    why_not_v2 = "it is a proposer of vLLM's class custom_class, which V2 does not have"
    proposer = "vllm_dlm.spec_decode.aded.proposer:AdedProposer"
    vllm_method = "custom_class"
    attaches_probs = False

    corpus: str | None = Field(
        default=None,
        min_length=1,
        description="File of tri-grams; `vllm-dlm count-trigrams` makes it. Default: "
        "the texts that are served only.",
    )
    memory: Literal["request", "shared"] = Field(
        default="request",
        description="Whether each request learns from its own text alone, or all from "
        "each other's. A request with a seed and a temperature keeps to itself in any "
        "case, so that its text does not depend on others.",
    )
    memory_size: Count | None = Field(
        default=None,
        ge=1024,
        le=50_000_000,
        description="Most tri-grams that a shared memory holds; when it is full, the "
        "half that came up longest ago is forgotten. Default: 1,000,000, some 50 MB.",
    )
    learn_prompt: bool = Field(
        default=True, description="Whether the prompt's tri-grams are learned as well."
    )
    window: Count = Field(
        default=16,
        ge=3,
        le=4096,
        description="Last tokens whose tri-grams gain weight.",
    )
    increment: Number = Field(
        default=0.04, ge=0, le=3, description="Weight that they gain per round."
    )
    cap: Number = Field(default=3.0, ge=1, le=1e6, description="Most that one weighs.")
    iterations: Count = Field(
        default=150, ge=1, le=10_000, description="Of the tree search, per round."
    )
    depth: Count = Field(default=4, ge=1, le=64, description="Of the search tree.")
    top_k: Count = Field(
        default=24, ge=1, le=128, description="Successors of a node that are searched."
    )
    seed: Count = Field(default=0, ge=0, description="Of the search's roll-outs.")

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.memory == "request" and self.memory_size is not None:
            raise ValueError(
                "memory_size bounds a shared memory, and memory is 'request': set "
                "memory to 'shared', or leave memory_size out"
            )
        return self


class Lud(Options):
    """The model itself drafts, behind pad tokens that it was trained for."""

    summary = "a model trained for it drafts for itself behind appended pad tokens"
    paper = "LUD, arXiv 2405.15208 (a reconstruction: no code is public)"
    proposer = "vllm_dlm.spec_decode.lud.proposer:LudProposer"
    why_not_v2 = "it lays pads behind a text in the inputs of V1's draft model"
    # The rule that ends a draft looks at the token that it may drop.
    attaches_probs = False

    num_speculative_tokens: Count = Field(
        default=8,
        ge=1,
        le=MAX_DRAFT,
        description="Most tokens that one draft may have: one more than pads.",
    )
    pad_token_id: Count | None = Field(
        default=None,
        ge=0,
        description="The token that is appended. Default: what `vllm-dlm train lud` "
        "has written into config.json.",
    )
    threshold: Number = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="A draft ends before its first token, but for the first of all, "
        "that is not more probable than this. 0: by its length only.",
    )


class Jacobi(Options):
    """The target's own last guesses behind a rejection draft."""

    summary = "the model's own guesses behind the last rejection are its next draft"
    paper = "CEED-VLA, arXiv 2506.13725, without its early exit; CLLM, 2403.00835"
    proposer = "vllm_dlm.spec_decode.jacobi.proposer:JacobiProposer"
    why_not_v2 = "it reads what V1 samples at each drafted position"
    vllm_method = "custom_class"
    attaches_probs = False

    num_speculative_tokens: Count = Field(
        default=16,
        ge=1,
        le=MAX_DRAFT,
        description="Tokens of a block, all of which are guessed anew in each forward.",
    )


METHODS: dict[str, type[Options]] = {
    "deer": Deer,
    "specdec++": SpecDecPlusPlus,
    "del": Del,
    "aded": Aded,
    "lud": Lud,
    "jacobi": Jacobi,
}
"""Value of "method" -> its options."""


def is_ours(speculative_config: Mapping[str, Any] | None) -> bool:
    """Whether a user's dict asks for one of our methods."""
    return (speculative_config or {}).get("method") in METHODS


def parse(speculative_config: Mapping[str, Any]) -> Options:
    """The options of a user's dict.

    Raises:
        ValueError: unknown or invalid options; names the valid ones.
    """
    given = {
        key.replace("-", "_"): value
        for key, value in speculative_config.items()
        if key != "method"
    }
    method = speculative_config["method"]
    kind = METHODS[method]
    where = f"speculative config of {method!r}"
    needs_drafter = issubclass(kind, WithDrafter)
    if needs_drafter and not given.get("model"):
        raise ValueError(f'{where}: it needs a drafter: set "model"')
    if not needs_drafter and "model" in given:
        raise ValueError(
            f'{where}: it drafts without a second model; leave out "model"'
        )
    for name in given:
        if name not in kind.model_fields:
            raise ValueError(f"{where}: {unknown(name, kind.model_fields)}")
    try:
        return kind(**given)
    except ValidationError as error:
        raise ValueError(f"{where}: {explain(error)}") from None


def to_plain(method: str, options: Options) -> dict[str, Any]:
    """What `additional_config` carries to the worker."""
    return {"method": method, **options.model_dump()}


def from_plain(plain: Mapping[str, Any]) -> Options:
    """The options that `to_plain` wrote."""
    values = dict(plain)
    return METHODS[values.pop("method")](**values)


def request_limit(extra_args: Mapping[str, Any] | None, most: int) -> int:
    """Most tokens that a draft for this request may have.

    Raises:
        ValueError: the request's own limit is no integer from 0 to `most`.
    """
    limit = (extra_args or {}).get(REQUEST_KEY, most)
    if isinstance(limit, float) and limit.is_integer():
        limit = int(limit)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 <= limit <= most:
        raise ValueError(
            f"{REQUEST_KEY}: expected an integer from 0 (no speculation) to {most}, "
            f"got {quote(limit)}"
        )
    return limit
