# SPDX-License-Identifier: Apache-2.0
"""How a family's config.json is read: one mechanism, and a table for each family.

A config comes under the released names or under others, with values of any type, and
sometimes from a network that only looks like the family's. `read` brings it into the
standard names of vLLM's classes, or says in one sentence what is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vllm_dlm.model_executor.models.config_fields import (
    FRACTION,
    KINDS,
    NUMBER,
    OTHER_NAMES,
    SIZE,
    check_kind,
    shown,
)
from vllm_dlm.model_executor.models.names import ModuleNames
from vllm_dlm.model_executor.models.rope import read_rope

ON_OR_OFF = (True, False)

_NONE = (0, False)
_PLAIN_LLAMA: Mapping[str, tuple[Any, ...]] = {
    # The layer
    "hidden_act": ("silu", "swish"),
    "layer_norm_type": ("rms", "rms_norm", "rmsnorm", "RMSNorm"),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False,),
    "block_type": ("llama",),
    "block_group_size": (1,),
    "norm_head": (False,),
    # Attention
    "use_qk_norm": (False,),
    "multi_query_attention": (False,),
    "use_sliding_window": (False,),
    "attention_chunk_size": _NONE,
    "dual_chunk_attention_config": (),
    "clip_qkv": _NONE,
    "attn_logit_softcapping": _NONE,
    # Positions
    "alibi": (False,),
    "rope": (True,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_interleaved": (False,),
    "is_neox_style": (True,),
    "partial_rotary_factor": (1,),
    # Biases
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "bias": (False,),
    "use_bias": (False,),
    "qkv_bias": (False,),
    "use_qkv_bias": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    # Scales
    "scale_logits": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "final_logit_softcapping": _NONE,
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "input_emb_norm": (False,),
    # Experts
    "num_experts": _NONE,
    "num_shared_experts": _NONE,
    "shared_expert_intermediate_size": _NONE,
    "expert_capacity": _NONE,
    "first_k_dense_replace": _NONE,
    "moe_layer_freq": (1,),
    "moe_router_enable_expert_bias": (False,),
    "score_function": ("softmax",),
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "topk_method": ("greedy",),
    "routed_scaling_factor": (1,),
    # Other networks
    "vision_config": (),
    "audio_config": (),
    "use_regular_causal": (False,),
}
"""Field -> the values that a Llama-like network without experts computes. A field of
it with any other value stands for a network that we have not; null stands for none."""

_FALSE_IS_NONE = ("rope_scaling", "sliding_window")

QWEN2_BIASES = dict.fromkeys(
    ("attention_bias", "qkv_bias", "use_qkv_bias", "include_qkv_bias"), (True,)
)
"""Qwen2's network: biases on queries, keys and values, and nowhere else."""


@dataclass(frozen=True)
class Family:
    """What a family's config.json may say."""

    name: str
    architectures: tuple[str, ...]
    """HF architectures that are this network; the first one where it names none."""
    computes: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    """Where it differs from a plain Llama: field -> values, None for any."""
    rope_theta: float | None = 1e4
    """RoPE's base where the config names none; None leaves all of it to the class."""
    rope_extra: tuple[str, ...] = ()
    """Further RoPE parameters that its class reads."""
    module_names: ModuleNames | None = None
    """What its modules are called in checkpoints, where that is not as in vLLM."""
    windows_are_off: bool = True
    """A `sliding_window` counts only with `use_sliding_window`, as in Qwen's."""

    @property
    def source(self) -> str:
        """The config, in messages."""
        return f"the {self.name} config"


def read(family: Family, given: dict[str, Any]) -> None:
    """Bring a config's fields into standard names, RoPE included, and check them.

    Args:
        given: what config.json says; changed in place. Fields that say nothing are
            taken out.

    Raises:
        ValueError: one sentence about the first field that is wrong.
    """
    for name in [name for name, value in given.items() if _is_nothing(name, value)]:
        del given[name]
    check_kind("text_config", given.get("text_config"), family.source)
    # A nested text model, the only one; what stands beside it wins.
    for name, value in (given.pop("text_config", None) or {}).items():
        if not _is_nothing(name, value):
            given.setdefault(name, value)
    spelled = _rename(family, given)
    for name, value in given.items():
        check_kind(name, value, family.source, spelled.get(name))
        if KINDS.get(name) in (SIZE, NUMBER, FRACTION):
            # Transformers takes no integer for a float.
            given[name] = float(value)
    _check_architecture(family, given)
    _check_values(family, given, spelled)
    _check_sizes(family, given)
    read_rope(family.name, given, theta=family.rope_theta, extra=family.rope_extra)


def _is_nothing(name: str, value: Any) -> bool:
    """Whether a field says nothing: null or, as RND1 writes some, false."""
    return value is None or (value is False and name in _FALSE_IS_NONE)


def _rename(family: Family, given: dict[str, Any]) -> dict[str, str]:
    """Standard names for all fields; returns what the config has for those it renamed.

    Raises:
        ValueError: two names of one thing have different values.
    """
    spelled: dict[str, str] = {}
    for standard, others in OTHER_NAMES.items():
        for other in others:
            if other not in given:
                continue
            value = given.pop(other)
            if given.setdefault(standard, value) != value:
                raise ValueError(
                    f"{family.source} has {spelled.get(standard, standard)} "
                    f"{shown(given[standard])} and {other} {shown(value)}, which are "
                    "two names of one thing: leave one of them out"
                )
            spelled.setdefault(standard, other)
    return spelled


def _check_architecture(family: Family, given: dict[str, Any]) -> None:
    named = given.get("architectures") or []
    if named and not set(named) & set(family.architectures):
        raise ValueError(
            f"architectures in {family.source} is {', '.join(named)}; vllm-dlm serves "
            f"this model type as {' or '.join(family.architectures)}"
        )
    given["architectures"] = [
        name for name in named if name in family.architectures
    ] or [family.architectures[0]]


def _check_values(
    family: Family, given: dict[str, Any], spelled: Mapping[str, str]
) -> None:
    for name, value in given.items():
        values = family.computes.get(name, _PLAIN_LLAMA.get(name))
        if name not in family.computes and name not in _PLAIN_LLAMA:
            continue
        if values is None or value in values:
            continue
        if isinstance(value, list) and value and all(one in values for one in value):
            continue
        valid = ", ".join(dict.fromkeys(map(shown, values))) or "to be left out"
        raise ValueError(
            f"{spelled.get(name, name)} in {family.source} is {shown(value)}, which "
            f"vllm-dlm does not implement for this family; it has to be {valid}"
        )
    # The classes count the layers themselves: all are of the one kind.
    if layers := set(given.pop("layer_types", ())) - {"full_attention"}:
        raise ValueError(
            f"layer_types in {family.source} has {', '.join(sorted(layers))}, which "
            "vllm-dlm does not implement; all layers have to be full_attention"
        )
    window_is_on = given.get("use_sliding_window", not family.windows_are_off)
    if given.get("sliding_window") and window_is_on:
        raise ValueError(
            f"sliding_window in {family.source} is {given['sliding_window']}, which "
            "vllm-dlm does not implement; it has to be left out, or switched off by "
            "use_sliding_window false"
        )


def _check_sizes(family: Family, given: Mapping[str, Any]) -> None:
    size, heads = given.get("hidden_size"), given.get("num_attention_heads")
    groups = given.get("num_key_value_heads")
    if size and heads and not given.get("head_dim") and size % heads:
        raise ValueError(
            f"hidden_size {size} in {family.source} is not a multiple of "
            f"num_attention_heads {heads}, and there is no head_dim"
        )
    experts, chosen = given.get("num_experts"), given.get("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        raise ValueError(
            f"num_experts_per_tok in {family.source} is {chosen}, more than its "
            f"{experts} num_experts"
        )
    if heads and groups and heads % groups:
        raise ValueError(
            f"num_attention_heads {heads} in {family.source} is not a multiple of "
            f"num_key_value_heads {groups}"
        )


_OVERRIDDEN_WHOLE = (
    *("rope_parameters", "rope_scaling"),
    *("dlm_options", "dlm_strategy_config", "dlm_other_strategies"),
)


class FamilyConfig:
    """What every config class of ours does besides its parent; put it before that.

    A field that is set later, as `--hf-overrides` does, is read as if config.json had
    said it.
    """

    family: ClassVar[Family]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a config.json's content; every loader goes through here.

        Raises:
            ValueError: one sentence about what is wrong in it.
        """
        with _in_one_sentence(cls.family):
            made = super().from_dict(  # type: ignore[misc]
                copy.deepcopy(config_dict), **kwargs
            )
        config = made[0] if isinstance(made, tuple) else made
        said = copy.deepcopy(config_dict)
        if "name_or_path" in kwargs:
            said["name_or_path"] = kwargs["name_or_path"]
        config.__dict__["_said"] = said
        return made

    def update(self, config_dict: dict[str, Any]) -> None:
        """Read the config again, `config_dict` over what config.json says.

        Raises:
            ValueError: as `from_dict`.
        """
        if "_said" not in self.__dict__:
            super().update(config_dict)  # type: ignore[misc]
            return
        said = dict(self.__dict__["_said"])
        for name in config_dict:
            # Another name of the same thing stands back.
            standard = next((s for s, o in OTHER_NAMES.items() if name in o), name)
            for other in (standard, *OTHER_NAMES.get(standard, ())):
                if other != name:
                    said.pop(other, None)
        if {"rope_parameters", "rope_scaling"} & set(config_dict):
            said.pop("rope_parameters", None)
            said.pop("rope_scaling", None)
        fresh = type(self).from_dict({**said, **config_dict})
        self.__class__ = type(fresh)
        self.__dict__.update(fresh.__dict__)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field of a config that is complete: checked, or read anew.

        Overrides whose values are dictionaries come this way, and not by `update`.
        """
        if "_said" in self.__dict__:
            is_new = value is not self.__dict__.get("rope_parameters")
            if name in _OVERRIDDEN_WHOLE and is_new:
                self.update({name: value})
                return
            if name in KINDS:
                check_kind(name, value, self.family.source)
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """The fields, without what they were read from."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        fields.pop("_said", None)
        return fields


@contextmanager
def _in_one_sentence(family: Family) -> Iterator[None]:
    """Say of any error inside that it is about the config, in one sentence."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"{family.source} cannot be read: {type(error).__name__}: {text}"
        ) from error
