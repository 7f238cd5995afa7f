# SPDX-License-Identifier: Apache-2.0
"""What a model family declares to the engine: the `dlm_*` fields of its HF config.

A family's config class calls `declare` with the family's values; a checkpoint's
config.json may override each of them by the same name. The engine reads
`ModelDefaults`, never a family's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from vllm_dlm.strategies.base import EditTokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NO_MASK = -1
"""Mask id of a model that has no mask: what it has not decided are random tokens."""

DEFAULT_MAX_CANVAS = 1024
"""Canvas limit, in positions, of a model that declares none of its own."""

Attention: TypeAlias = Literal["full", "block", "causal"]
"""What a position sees. `full`: everything. `block`: all blocks up to its own, the
prompt's included. `causal`: the prompt and finished text causally, its own block whole.
"""

EDIT_TOKEN_FIELDS = ("delete_token_id", "split_token_id")
"""Of config.json: what `EditTokens` are read from."""

LETTERS: Mapping[str, Attention] = {"A": "full", "B": "block", "C": "causal"}
"""What `dlm_class` in a config.json may say in place of the words."""


def attention_of(hf_config: PretrainedConfig) -> Any:
    """The `Attention` that a config declares as `dlm_class`.

    Returns:
        What it declares, as it is, where that is no kind of attention: refused by
        `check_declarations`.
    """
    declared = hf_config.dlm_class
    return LETTERS.get(declared, declared)


@dataclass(frozen=True)
class ModelDefaults:
    """What a model's HF config declares to the engine."""

    strategy: str
    block_length: int
    mask_token_id: int
    attention: Attention = "full"
    max_canvas: int = DEFAULT_MAX_CANVAS
    """Widest canvas by default, in positions: the widest that the model was trained
    on, where that is known."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text besides the tokenizer's end of text."""
    shift: int = 0
    """The logits for position i are those of row i - shift."""
    leads: bool = False
    """Without a shift too, a block's first token is that of the row to its left."""
    sub_block_length: int | None = None
    """Positions of a block that are decided together, from the left; None for the
    whole block."""
    block_origin: Literal["start", "prompt"] = "prompt"
    """Where blocks are counted from: position 0, or the prompt's end."""
    schedule: Literal["even", "rounded"] = "even"
    """How a step schedule divides m masks over s steps: m // s and one more in each of
    the first m mod s, or round(masks left / steps left)."""
    reference_confidence: Literal["model", "drawn"] = "model"
    """What the family's own code takes for a drawn token's probability: the model's, or
    that under temperature and top-k/p. Only `reference_exact` follows it."""
    strategy_config: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of `strategy` that differ from its own defaults."""
    other_strategies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The same of further strategies, by name, as published for the family."""
    draft_length: int | None = None
    """Masks behind a text that it was trained to fill in one step, as a drafter
    (`vllm-dlm train deer`); None where that is not known."""
    noise: Literal["mask", "uniform"] = "mask"
    """What a position holds where nothing is decided: the mask, or a random token."""
    edit_tokens: EditTokens | None = None
    """By which the model deletes and inserts positions; None if it does neither."""
    expand_token: int | None = None
    """By which the model asks for two masks in place of one (DreamOn): no text, and
    written in elastic holes alone (`elastic.py`). None if it does not."""
    soft_inputs: bool = False
    """The engine makes the input embeddings of each forward itself, as the model needs
    or the server wants: then strategies may feed mixtures (`Strategy.soft`)."""

    @property
    def reuses_blocks(self) -> bool:
        """Whether a finished block's KV is final: with all but full attention."""
        return self.attention != "full"

    @property
    def no_text(self) -> tuple[int, ...]:
        """Tokens that are never written: what holds a place, or asks for places."""
        expand = () if self.expand_token is None else (self.expand_token,)
        return (self.mask_token_id, *expand)

    @property
    def leads_blocks(self) -> bool:
        """Whether a block's first token is predicted by the row to its left.

        That row is in the block before, whose rows are right only once it is finished:
        they are computed first, alone. With a shift it cannot be otherwise.
        """
        return self.reuses_blocks and (self.leads or self.shift == 1)

    def begins_with_lead(self, block_start: Any, prompt_len: Any) -> Any:
        """Whether a block's first step is its lead; of one block or, tensors, of many.

        Not where the prompt ends inside the block.
        """
        return (block_start >= prompt_len) & self.leads_blocks

    def origin(self, prompt_len: int, block_length: int) -> int:
        """Position from which the blocks of a request are counted, below its length."""
        return 0 if self.block_origin == "start" else prompt_len % block_length

    def own_block(self, served: int | str | None) -> int:
        """Positions of a block as the model has them, whatever a request asks for.

        Args:
            served: the server's option `block_length`, by which finished blocks go.
        """
        is_served = self.reuses_blocks and isinstance(served, int)
        return int(served or 0) if is_served else self.block_length

    @classmethod
    def from_hf_config(cls, hf_config: PretrainedConfig) -> ModelDefaults:
        """Read the `dlm_*` attributes of one of our HF config classes."""
        return cls(
            strategy=getattr(hf_config, "dlm_strategy", "threshold"),
            block_length=getattr(hf_config, "dlm_block_length", 32),
            mask_token_id=hf_config.mask_token_id,
            attention=attention_of(hf_config),
            max_canvas=getattr(hf_config, "dlm_max_canvas", None) or DEFAULT_MAX_CANVAS,
            # vLLM takes a config's end of text from its generation_config.json only.
            stop_ids=tuple(
                id_
                for id_ in declared_stop_ids(hf_config)
                if 0 <= id_ < hf_config.vocab_size
            ),
            shift=getattr(hf_config, "dlm_shift", 0),
            leads=getattr(hf_config, "dlm_seeds", False),
            sub_block_length=getattr(hf_config, "dlm_sub_block_length", None),
            block_origin=getattr(hf_config, "dlm_block_origin", "prompt"),
            schedule=getattr(hf_config, "dlm_schedule", "even"),
            reference_confidence=getattr(
                hf_config, "dlm_reference_confidence", "model"
            ),
            strategy_config=getattr(hf_config, "dlm_strategy_config", {}),
            other_strategies=getattr(hf_config, "dlm_other_strategies", {}),
            draft_length=getattr(hf_config, "dlm_draft_length", None),
            noise=getattr(hf_config, "dlm_noise", "mask"),
            edit_tokens=edit_tokens_of(hf_config),
            expand_token=getattr(hf_config, "expand_token_id", None),
            soft_inputs=getattr(hf_config, "dlm_soft_inputs", False),
        )


def edit_tokens_of(hf_config: PretrainedConfig) -> EditTokens | None:
    """The `EditTokens` that a config declares, in LLaDA2.2's names; None without both.

    `check_declarations` refuses one of them alone.
    """
    ids = [getattr(hf_config, name, None) for name in EDIT_TOKEN_FIELDS]
    given = [token for token in ids if token is not None]
    return EditTokens(*given) if len(given) == len(ids) else None


def declared_stop_ids(hf_config: PretrainedConfig) -> list[int]:
    """The ids in `dlm_stop_ids` and `eos_token_id`, which end a text, in rising order.

    Some may lie outside the vocabulary, where a checkpoint's is smaller than its
    family's.
    """
    fields = (getattr(hf_config, n, None) for n in ("dlm_stop_ids", "eos_token_id"))
    return sorted({id_ for ids in fields for id_ in as_ids(ids)})


def as_ids(ids: int | Iterable[int] | None) -> tuple[int, ...]:
    """Token ids as config files write them: one id, a list of ids, or nothing."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def declare(
    config: PretrainedConfig,
    given: dict[str, Any],
    *,
    dlm_class: Attention,
    mask_token_id: int,
    dlm_block_length: int = 32,
    dlm_shift: int = 0,
    dlm_seeds: bool = False,
    dlm_sub_block_length: int | None = None,
    dlm_block_origin: Literal["start", "prompt"] = "prompt",
    dlm_schedule: Literal["even", "rounded"] = "even",
    dlm_reference_confidence: Literal["model", "drawn"] = "model",
    dlm_strategy: str = "threshold",
    dlm_strategy_config: Mapping[str, Any] | None = None,
    dlm_other_strategies: Mapping[str, Mapping[str, Any]] | None = None,
    dlm_max_canvas: int | None = None,
    dlm_draft_length: int | None = None,
    dlm_soft_inputs: bool = False,
    dlm_noise: Literal["mask", "uniform"] = "mask",
    dlm_generation_fields: Mapping[str, str] | None = None,
    dlm_options: Mapping[str, Any] | None = None,
    dlm_stop_ids: tuple[int, ...] = (),
    delete_token_id: int | None = None,
    split_token_id: int | None = None,
) -> None:
    """Set a family's declarations on its HF config; call it before `super().__init__`.

    Args:
        config: the config being built.
        given: the config's remaining keyword arguments, which `read` has checked;
            declarations in it win, and are taken out of it.
        dlm_generation_fields: parameter of the strategy -> where the checkpoint's
            generation_config.json has it; an object's field is behind a dot.
    """
    declared: dict[str, Any] = {
        "dlm_class": dlm_class,
        "mask_token_id": mask_token_id,
        "dlm_block_length": dlm_block_length,
        "dlm_shift": dlm_shift,
        "dlm_seeds": dlm_seeds,
        "dlm_sub_block_length": dlm_sub_block_length,
        "dlm_block_origin": dlm_block_origin,
        "dlm_schedule": dlm_schedule,
        "dlm_reference_confidence": dlm_reference_confidence,
        "dlm_strategy": dlm_strategy,
        "dlm_strategy_config": dict(dlm_strategy_config or {}),
        "dlm_other_strategies": dict(dlm_other_strategies or {}),
        "dlm_max_canvas": dlm_max_canvas,
        "dlm_draft_length": dlm_draft_length,
        "dlm_soft_inputs": dlm_soft_inputs,
        "dlm_noise": dlm_noise,
        "dlm_generation_fields": dict(dlm_generation_fields or {}),
        "dlm_options": dict(dlm_options or {}),
        "dlm_stop_ids": list(dlm_stop_ids),
        "delete_token_id": delete_token_id,
        "split_token_id": split_token_id,
    }
    for name in declared:
        value = given.pop(name, None)
        if value is not None:
            declared[name] = value
    declared["dlm_stop_ids"] = list(as_ids(declared["dlm_stop_ids"]))
    for name, value in declared.items():
        setattr(config, name, value)
    # vLLM takes a model for a diffusion model exactly when this is set.
    given.pop("canvas_length", None)
    config.canvas_length = declared["dlm_block_length"]
