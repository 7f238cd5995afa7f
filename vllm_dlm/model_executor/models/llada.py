# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B and LLaDA-1.5 as their difference from vLLM's Llama.

The network is Llama with full bidirectional attention; what differs is the weights'
names (`names.py`). Two tensors are called `ff_out`: `transformer.ff_out` is the head,
`blocks.N.ff_out` the MLP's down projection; and `ff_proj` is the *gate*. RoPE is
Llama's half rotation; the reference rotates in float32, vLLM in the model's dtype
with a float32-built table, a numeric drift without effect on float32 parity.
Tensor parallelism and quantisation come from the parent.
"""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin
from vllm_dlm.model_executor.models.names import LLADA_NAMES

LLADA_TO_LLAMA = WeightsMapper(orig_to_new_regex=LLADA_NAMES.patterns())


class LLaDAModelLM(DiffusionModelMixin, LlamaForCausalLM):
    """LLaDA (architecture `LLaDAModelLM`)."""

    hf_to_vllm_mapper = LLADA_TO_LLAMA | LlamaForCausalLM.hf_to_vllm_mapper
    # The Llama part packs q/k/v and gate/up by itself: rename, no more.
    names_in_files = LLADA_TO_LLAMA
