# SPDX-License-Identifier: Apache-2.0
"""Which layers a model keeps: the rule of unified layer skipping (arXiv 2404.06954).

The rule looks at the number of layers and at the wanted speed-up only: every token of
every text is computed by the same layers, so that batches and KV pages stay whole.
"""

from __future__ import annotations

from typing import Any

from vllm_dlm.messages import quote, unknown

KEY = "layer_skip"
"""Entry of config.json: {"speedup": S} or {"reserved": [layers, from 0]}."""

ARCHITECTURES = {
    "LlamaForCausalLM": "LayerSkipLlamaForCausalLM",
    "Qwen2ForCausalLM": "LayerSkipQwen2ForCausalLM",
    "Qwen3ForCausalLM": "LayerSkipQwen3ForCausalLM",
}
"""Architecture -> the class that serves it with some of its layers."""


def reserved_layers(num_layers: int, speedup: float) -> list[int]:
    """The layers that are computed, ascending, from 0.

    The first and the last one, and between them every `step`-th, until there are
    `num_layers` / `speedup` (rounded down) of them.

    Args:
        num_layers: L, of the whole model.
        speedup: From 1 to L / 2.

    Raises:
        ValueError: fewer than two layers would be left, or more than there are.
    """
    most = num_layers / 2
    if not 1 <= speedup <= most:
        raise ValueError(
            f"speedup must be from 1 to {most:g} with {num_layers} layers, of which "
            f"two are kept at least, not {speedup}"
        )
    count = int(num_layers / speedup)
    step = int(num_layers / (count - 1))
    inner = range(step, num_layers - 1, step)
    return [0, *inner[: count - 2], num_layers - 1]


def read_schedule(config: Any) -> list[int]:
    """The layers that a model's configuration keeps, ascending.

    Args:
        config: A `PretrainedConfig` with `layer_skip` and `num_hidden_layers`.

    Raises:
        ValueError: it says none, or no layers of this model.
    """
    num_layers: int = config.num_hidden_layers
    said = getattr(config, KEY, None)
    if not isinstance(said, dict) or len(said) != 1:
        raise ValueError(
            f'config.json: {KEY} must be {{"speedup": S}} or {{"reserved": [layers]}}, '
            f"not {quote(said)}; `vllm-dlm train layer-skip` writes it"
        )
    [(name, value)] = said.items()
    if name == "speedup":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"config.json: {KEY}.speedup must be a number, not {quote(value)}"
            )
        return reserved_layers(num_layers, value)
    if name != "reserved":
        raise ValueError(
            f"config.json: {KEY}: {unknown(name, ('speedup', 'reserved'))}"
        )
    is_list = isinstance(value, list) and all(type(layer) is int for layer in value)
    if not is_list or not value or value != sorted({*value}):
        raise ValueError(
            f"config.json: {KEY}.reserved must be ascending layers, not {quote(value)}"
        )
    if not 0 <= value[0] <= value[-1] < num_layers:
        raise ValueError(
            f"config.json: {KEY}.reserved must be of the layers 0 to "
            f"{num_layers - 1}, not {value}"
        )
    return list(value)
