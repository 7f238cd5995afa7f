# SPDX-License-Identifier: Apache-2.0
"""Nemotron-Labs-Diffusion: the network is Ministral-3's, vLLM's Mistral.

What differs is the weights' names: the network is `encoder`, its head
`diffusion_head`.
"""

from __future__ import annotations

from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin
from vllm_dlm.model_executor.models.names import NEMOTRON_NAMES

NEMOTRON_TO_MISTRAL = WeightsMapper(orig_to_new_regex=NEMOTRON_NAMES.patterns())


class NemotronLabsDiffusionModel(DiffusionModelMixin, MistralForCausalLM):
    """Nemotron-Labs-Diffusion (architecture `NemotronLabsDiffusionModel`)."""

    hf_to_vllm_mapper = NEMOTRON_TO_MISTRAL | MistralForCausalLM.hf_to_vllm_mapper
    # And not Mistral's own loader, which also looks for names of Mistral's own format.
    names_in_files = NEMOTRON_TO_MISTRAL
