# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma in our engine: Gemma 4's network, text alone, and what conditions it.

Rows of a prompt and of finished canvases are read as Gemma 4 reads text. Rows of the
active canvas are conditioned on what the last step expected of them (`condition`), and
have layer scalars of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gemma4 import Gemma4Model
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    maybe_prefix,
)

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin
from vllm_dlm.model_executor.models.layer_scalars import LayerScalars


class SelfConditioning(nn.Module):
    """What a canvas row is fed of its token and of what was expected of it.

    Args:
        hidden_size: H.
        inner_size: of the gated layer.
        eps: of the norms.
    """

    def __init__(self, hidden_size: int, inner_size: int, eps: float) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(hidden_size, eps=eps)
        self.post_norm = RMSNorm(hidden_size, eps=eps, has_weight=False)
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, embeds: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        """[n, H], of embedded tokens [n, H] and soft inputs [n, H], 0 for none."""
        normed = self.pre_norm(soft)
        gate = functional.gelu(self.gate_proj(normed), approximate="tanh")
        conditioned: torch.Tensor = self.post_norm(
            embeds + self.down_proj(gate * self.up_proj(normed))
        )
        return conditioned


class DlmDiffusionGemma(DiffusionModelMixin, nn.Module):
    """DiffusionGemma's text model (architecture `DlmDiffusionGemma`)."""

    is_canvas: torch.Tensor
    """[rows, 1] bool: which rows of the next forward are of an active canvas."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.decoder.self_conditioning.": "self_conditioning.",
            "model.decoder.": "model.",
            # Tied to the decoder's, but for the layer scalars, which are noted.
            "model.encoder.language_model.": None,
            "model.encoder.vision_tower.": None,
            "model.encoder.embed_vision.": None,
        }
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # Not the mixin's, which builds a whole model of vLLM's.
        nn.Module.__init__(self)
        config: Any = vllm_config.model_config.hf_config
        self.config = config
        quant_config = vllm_config.quant_config
        self.model = Gemma4Model(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.self_conditioning = SelfConditioning(
            config.hidden_size, config.intermediate_size, config.rms_norm_eps
        )
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer(
            "is_canvas", torch.zeros(rows, 1, dtype=torch.bool), persistent=False
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[n, H]: the embeddings of tokens [n], times the root of H."""
        network: Any = self.model
        embeds: torch.Tensor = network.embed_input_ids(input_ids)
        return embeds

    def condition(self, embeds: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        """[n, H]: what canvas rows are fed.

        Args:
            embeds: [n, H], as of `embed_input_ids`.
            soft: [n, H]: what the last step expected there; 0 in a canvas' first step.
        """
        conditioned: torch.Tensor = self.self_conditioning(embeds, soft)
        return conditioned

    def mixed(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[n, H], as `DiffusionModelMixin.mixed`, times the root of H."""
        return super().mixed(probabilities) * self.model.normalizer

    def mark_canvas_rows(self, is_canvas: torch.Tensor) -> None:
        """Say which rows [n] of the next forward are of an active canvas."""
        self.is_canvas[: len(is_canvas), 0] = is_canvas

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[n, H]: the hidden states of n rows."""
        hidden: torch.Tensor = self.model(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] float32: this rank's part of the logits of rows [n, H], capped."""
        logits = super().logits(hidden).float()
        cap = self.config.final_logit_softcapping
        if cap is None:
            return logits
        return logits.div_(cap).tanh_().mul_(cap)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, without what reads images.

        Raises:
            ValueError: tensors are left over.
        """
        scalars = LayerScalars()
        # A leftover of the checkpoint that the released one was made from.
        loader = AutoWeightsLoader(
            self, ignore_unexpected_prefixes=["embed_vision.embedding."]
        )
        loaded = loader.load_weights(
            scalars.noted(weights), mapper=self.hf_to_vllm_mapper
        )
        scalars.install(self.model.layers, self.is_canvas)
        return loaded
