# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B and LLaDA-1.5 as their difference from vLLM's Llama.

The network is Llama with full bidirectional attention; what differs is the weights'
names. Two tensors are called `ff_out`: `transformer.ff_out` is the head,
`blocks.N.ff_out` the MLP's down projection; and `ff_proj` is the *gate*. RoPE is
Llama's half rotation; the reference rotates in float32, vLLM in the model's dtype
with a float32-built table, a numeric drift without effect on float32 parity.
Tensor parallelism and quantisation come from the parent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_dlm.model_executor.models.diffusion import DiffusionModelMixin

LLADA_TO_LLAMA = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^model\.transformer\.ff_out\."): "lm_head.",
        re.compile(r"^model\.transformer\.wte\."): "model.embed_tokens.",
        re.compile(r"^model\.transformer\.ln_f\."): "model.norm.",
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.attn_norm\."): (
            r"model.layers.\1.input_layernorm."
        ),
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.ff_norm\."): (
            r"model.layers.\1.post_attention_layernorm."
        ),
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.attn_out\."): (
            r"model.layers.\1.self_attn.o_proj."
        ),
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.([qkv]_proj)\."): (
            r"model.layers.\1.self_attn.\2."
        ),
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.ff_proj\."): (
            r"model.layers.\1.mlp.gate_proj."
        ),
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.up_proj\."): (
            r"model.layers.\1.mlp.up_proj."
        ),
        re.compile(r"^model\.transformer\.blocks\.(\d+)\.ff_out\."): (
            r"model.layers.\1.mlp.down_proj."
        ),
    }
)


class LLaDAModelLM(DiffusionModelMixin, LlamaForCausalLM):
    """LLaDA (architecture `LLaDAModelLM`)."""

    hf_to_vllm_mapper = LLADA_TO_LLAMA | LlamaForCausalLM.hf_to_vllm_mapper

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint in LLaDA's own names."""
        # The Llama part packs q/k/v and gate/up by itself: rename, no more.
        return AutoWeightsLoader(self).load_weights(weights, mapper=LLADA_TO_LLAMA)
