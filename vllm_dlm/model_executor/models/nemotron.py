# SPDX-License-Identifier: Apache-2.0
"""Nemotron-Labs-Diffusion: the network is Ministral-3's, vLLM's Mistral.

What differs is the weights' names: the network is `encoder`, its head
`diffusion_head`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin

NEMOTRON_TO_MISTRAL = WeightsMapper(
    orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."}
)


class NemotronLabsDiffusionModel(DiffusionModelMixin, MistralForCausalLM):
    """Nemotron-Labs-Diffusion (architecture `NemotronLabsDiffusionModel`)."""

    hf_to_vllm_mapper = NEMOTRON_TO_MISTRAL | MistralForCausalLM.hf_to_vllm_mapper

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in Nemotron's own names."""
        # Not Mistral's loader, which also looks for names of Mistral's own format.
        return AutoWeightsLoader(self).load_weights(weights, mapper=NEMOTRON_TO_MISTRAL)
