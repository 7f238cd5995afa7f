# SPDX-License-Identifier: Apache-2.0
"""Modules' names of the two families that have names of their own, and vLLM's for them.

They stand in front of tensors, and alone: a quantised checkpoint lists the modules that
it left as they were.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class ModuleNames:
    """A family's names -> vLLM's."""

    layers: tuple[str, str]
    """The list of layers: `model.transformer.blocks`, `model.layers`."""
    inside: Mapping[str, str]
    """Modules of a layer."""
    outside: Mapping[str, str]
    """Modules beside the layers."""

    def modules(self, count: int) -> dict[str, str]:
        """All modules that have tensors, of a network of `count` layers."""
        theirs, ours = self.layers
        return dict(self.outside) | {
            f"{theirs}.{layer}.{name}": f"{ours}.{layer}.{renamed}"
            for layer in range(count)
            for name, renamed in self.inside.items()
        }

    def patterns(self) -> dict[re.Pattern[str], str]:
        """For vLLM's `WeightsMapper`: names of modules, and of all that is in them."""
        theirs, ours = re.escape(self.layers[0]), self.layers[1]
        rules = {
            rf"^{re.escape(name)}": renamed for name, renamed in self.outside.items()
        }
        for name, renamed in self.inside.items():
            rules[rf"^{theirs}\.(\d+)\.{re.escape(name)}"] = rf"{ours}.\1.{renamed}"
        # What is left: a layer as a whole, and all of them.
        rules[rf"^{theirs}"] = ours
        return {re.compile(rf"{rule}(?=\.|$)"): new for rule, new in rules.items()}

    def translate(self, quantisation: Any, count: int) -> Any:
        """A quantization_config whose lists and keys name vLLM's modules.

        Formats name modules in many ways: whole names, names of what contains them,
        parts of names, regular expressions behind `re:`, `+:` or `-:`, wildcards. What
        one of ours is meant by becomes the full names of all that it means.
        """
        return _translate(quantisation, self.modules(count), self.layers)


def _translate(value: Any, names: Mapping[str, str], layers: tuple[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {
            new: _translate(inner, names, layers)
            for key, inner in value.items()
            for new in _meant(key, names)
        }
    if isinstance(value, list | tuple):
        flat: list[Any] = []
        for item in value:
            if isinstance(item, str):
                flat.extend(_meant(item, names))
            else:
                flat.append(_translate(item, names, layers))
        return list(dict.fromkeys(flat)) if all(map(_is_text, flat)) else flat
    return layers[1] if value == layers[0] else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _meant(text: Any, names: Mapping[str, str]) -> list[Any]:
    """vLLM's names of the modules that `text` means; itself if it means none."""
    if not isinstance(text, str):
        return [text]
    found = [names[name] for name in _matching(text, names)]
    if found and text[:2] in ("+:", "-:"):
        return [f"{text[:2]}^(?:{'|'.join(map(re.escape, found))})$"]
    return found or [text]


def _matching(text: str, names: Mapping[str, str]) -> Iterator[str]:
    if text[:3] == "re:" or text[:2] in ("+:", "-:"):
        pattern = re.compile(text.partition(":")[2])
        return (name for name in names if pattern.match(name))
    if set(text) & set("*?"):
        return (name for name in names if fnmatchcase(name, text))
    return (name for name in names if f".{text}." in f".{name}.")


LLADA_NAMES = ModuleNames(
    layers=("model.transformer.blocks", "model.layers"),
    inside={
        "attn_norm": "input_layernorm",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "attn_out": "self_attn.o_proj",
        "ff_norm": "post_attention_layernorm",
        # The gate, which gets the silu.
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    },
    outside={
        "model.transformer.wte": "model.embed_tokens",
        "model.transformer.ln_f": "model.norm",
        # Another `ff_out` than that of a layer.
        "model.transformer.ff_out": "lm_head",
    },
)

NEMOTRON_NAMES = ModuleNames(
    layers=("encoder.layers", "model.layers"),
    inside={
        name: name
        for name in (
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    },
    outside={
        "encoder.embed_tokens": "model.embed_tokens",
        "encoder.norm": "model.norm",
        "diffusion_head": "lm_head",
    },
)
