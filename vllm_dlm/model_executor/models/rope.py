# SPDX-License-Identifier: Apache-2.0
"""RoPE in config.json, old layouts and new, as one dictionary that vLLM reads.

Old configs have `rope_theta` and a `rope_scaling` with a `type` or `rope_type`, new
ones have all of it in `rope_parameters`. What vLLM computes otherwise than Transformers
does, and what nobody's text needs, is refused: `dynamic` and `longrope` change with the
length of the text, so that the keys of finished blocks would change too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dlm.model_executor.models.config_fields import is_number, shown

READ = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Type of scaling -> what it cannot do without."""

_OPTIONAL = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
}
# Either says nothing that is computed, or repeats what stands beside it.
_ALWAYS = ("rope_type", "rope_theta", "partial_rotary_factor")
_IGNORED = ("type", "max_position_embeddings", "finetuned")
_SWITCHES = ("truncate",)


def read_rope(
    family: str,
    given: dict[str, Any],
    *,
    theta: float | None,
    extra: tuple[str, ...] = (),
) -> None:
    """Replace what `given` says of RoPE by `rope_parameters`, complete.

    Args:
        family: for messages.
        given: a config's fields, under their standard names.
        theta: the family's base, where the config names none; None leaves a config that
            says nothing of RoPE to its class.
        extra: further parameters that the family's class reads.

    Raises:
        ValueError: a scaling that is not read, or one that is incomplete or impossible.
    """
    source = f"the RoPE parameters of the {family} config"
    parameters = _the_one(source, given)
    is_silent = not parameters and given.get("rope_theta") is None
    base = given.pop("rope_theta", None)
    if is_silent and theta is None:
        return
    parameters.setdefault("rope_theta", base if base is not None else theta or 1e4)
    if (factor := given.get("partial_rotary_factor")) is not None:
        parameters.setdefault("partial_rotary_factor", factor)
    kind = _kind(source, parameters)
    parameters["rope_type"] = kind
    if "original_max_position_embeddings" in READ[kind]:
        # Beside the parameters it is what Transformers takes first.
        original = given.get("original_max_position_embeddings")
        if original is not None:
            parameters["original_max_position_embeddings"] = original
        elif (longest := given.get("max_position_embeddings")) is not None:
            parameters.setdefault("original_max_position_embeddings", longest)
    known = {*_ALWAYS, *READ[kind], *_OPTIONAL.get(kind, ()), *extra}
    if foreign := sorted(set(parameters) - known - set(_IGNORED)):
        raise ValueError(
            f"{source} name {', '.join(foreign)}, which vllm-dlm does not read with "
            f"the type {kind!r}; it reads {', '.join(sorted(known))}"
        )
    if missing := [name for name in READ[kind] if parameters.get(name) is None]:
        raise ValueError(
            f"{source} lack {', '.join(missing)}, without which there is no {kind!r}"
        )
    parameters = {
        name: value
        for name, value in parameters.items()
        if name in known and value is not None
    }
    _check_numbers(source, parameters, extra)
    longest = given.get("max_position_embeddings")
    if kind == "yarn" and longest is not None:
        reach = parameters["factor"] * parameters["original_max_position_embeddings"]
        if longest > reach:
            # Not above: vLLM loads the config classes while it is half imported.
            from vllm.logger import init_logger

            init_logger(__name__).warning_once(
                "%s reach %d positions, factor times original_max_position_embeddings, "
                "not the %d of max_position_embeddings: that is the longest context.",
                source,
                reach,
                longest,
            )
            given["max_position_embeddings"] = int(reach)
    given["rope_parameters"] = parameters


def _the_one(source: str, given: dict[str, Any]) -> dict[str, Any]:
    """What the config says under either name, as a flat dictionary of its own."""
    found = [
        _flat(source, given[name])
        for name in ("rope_parameters", "rope_scaling")
        if given.get(name)
    ]
    given.pop("rope_parameters", None)
    given.pop("rope_scaling", None)
    if not found:
        return {}
    merged = dict(found[0])
    for name, value in found[-1].items():
        if merged.setdefault(name, value) != value:
            raise ValueError(
                f"{source} are there twice, as rope_parameters and rope_scaling, and "
                f"{name} differs: {shown(merged[name])} and {shown(value)}"
            )
    return merged


def _flat(source: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that are given per kind of layer: there is one kind here."""
    nested = {k: v for k, v in parameters.items() if isinstance(v, Mapping)}
    if not nested:
        return dict(parameters)
    if set(nested) != {"full_attention"}:
        raise ValueError(
            f"{source} are given for {', '.join(sorted(nested))}; vllm-dlm knows "
            "layers of full_attention only"
        )
    outer = {k: v for k, v in parameters.items() if k not in nested}
    return outer | dict(nested["full_attention"])


def _kind(source: str, parameters: Mapping[str, Any]) -> str:
    kind, legacy = parameters.get("rope_type"), parameters.get("type")
    if kind is not None and legacy is not None and kind != legacy:
        raise ValueError(
            f"{source} have the rope_type {shown(kind)} and the type {shown(legacy)}: "
            "leave one of them out"
        )
    kind = kind if kind is not None else legacy
    kind = "default" if kind is None else kind
    if not isinstance(kind, str) or kind not in READ:
        raise ValueError(
            f"{source} have the type {shown(kind)}, which vllm-dlm does not read; it "
            f"reads {', '.join(READ)}"
        )
    return kind


def _check_numbers(
    source: str, parameters: Mapping[str, Any], extra: tuple[str, ...]
) -> None:
    for name, value in parameters.items():
        if name == "rope_type":
            continue
        if name in _SWITCHES:
            if not isinstance(value, bool):
                raise ValueError(
                    f"{name} in {source} is {shown(value)}; it must be true or false"
                )
        elif not is_number(value) or value < 0 or (value == 0 and name not in extra):
            raise ValueError(
                f"{name} in {source} is {shown(value)}; it must be a positive number"
            )
    if parameters.get("partial_rotary_factor", 1.0) > 1:
        raise ValueError(
            f"partial_rotary_factor in {source} is "
            f"{parameters['partial_rotary_factor']}; it must be 1 or less"
        )
    low, high = parameters.get("low_freq_factor"), parameters.get("high_freq_factor")
    if low is not None and high is not None and high <= low:
        raise ValueError(
            f"high_freq_factor {high} in {source} must be larger than "
            f"low_freq_factor {low}"
        )
