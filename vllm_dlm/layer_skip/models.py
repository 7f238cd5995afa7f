# SPDX-License-Identifier: Apache-2.0
"""vLLM's Llama, Qwen2 and Qwen3 with some of their layers: `schedule.py` says which.

Layers keep their numbers, so that names in a checkpoint, in a quantisation's lists and
of KV pages are those of the whole model. A layer that is not kept has no weights, is
not computed, and has no KV pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from vllm_dlm.layer_skip.schedule import read_schedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class SkippedLayer(nn.Module):
    """Hands on what the layer below has handed on."""

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, H] hidden states and residual, as they came."""
        return hidden_states, residual


class SkipsLayers:
    """Mixin: a causal model of vLLM's without the layers that its schedule leaves out.

    Raises:
        ValueError: the configuration has no schedule, or not one of this model.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_text_config
        self.reserved = frozenset(read_schedule(config))
        layers: Any = self.model.layers  # type: ignore[attr-defined]
        # Where vLLM looks for layers that need KV pages.
        known = vllm_config.compilation_config.static_forward_context
        for index, layer in enumerate(layers):
            if index in self.reserved:
                continue
            for module in layer.modules():
                if isinstance(module, Attention):
                    del known[module.layer_name]
            layers[index] = SkippedLayer()
        logger.info(
            "Layer skipping: %d of %d layers are computed: %s.",
            len(self.reserved),
            len(layers),
            ", ".join(map(str, sorted(self.reserved))),
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint of the whole model, but for the layers that are skipped."""
        kept = (item for item in weights if not self._is_skipped(item[0]))
        loaded: set[str] = super().load_weights(kept)  # type: ignore[misc]
        return loaded

    def _is_skipped(self, name: str) -> bool:
        found = _LAYER.search(name)
        return found is not None and int(found[1]) not in self.reserved


class LayerSkipLlamaForCausalLM(SkipsLayers, LlamaForCausalLM):
    """A Llama (or Mistral in its layout) with some of its layers."""


class LayerSkipQwen2ForCausalLM(SkipsLayers, Qwen2ForCausalLM):
    """A Qwen2 or Qwen2.5 with some of its layers."""


class LayerSkipQwen3ForCausalLM(SkipsLayers, Qwen3ForCausalLM):
    """A Qwen3 with some of its layers."""
