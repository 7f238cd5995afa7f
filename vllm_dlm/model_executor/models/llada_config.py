# SPDX-License-Identifier: Apache-2.0
"""HF config of LLaDA-8B and LLaDA-1.5 in the standard names vLLM's Llama reads.

The released `config.json` uses OLMo-like names (`d_model`, `n_layers`, ...), omits
ids that only the tokenizer knows, and is served without `trust_remote_code`.
Source: ML-GSAI/LLaDA, `configuration_llada.py` fields as released.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

LLADA_MASK_ID = 126336
LLADA_EOT_ID = 126348
LLADA_VOCAB_SIZE = 126464


class LLaDAConfig(PretrainedConfig):
    """LLaDA's configuration, OLMo names mapped to Llama's.

    The `dlm_*` fields declare what kind of model it is, for the engine:

    - `dlm_class`: "A", full bidirectional attention, nothing reusable exactly.
    - `dlm_block_length`, `dlm_strategy`: serving defaults.
    - `dlm_max_canvas`: the widest canvas it was trained on, if that is known.
    - `dlm_stop_ids`: ids that end a text besides `eos_token_id`.
    """

    model_type = "llada"
    attribute_map = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "max_sequence_length": "max_position_embeddings",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_layers: int = 32,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        max_sequence_length: int = 4096,
        vocab_size: int = LLADA_VOCAB_SIZE,
        embedding_size: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 500000.0,
        weight_tying: bool = False,
        include_bias: bool = False,
        include_qkv_bias: bool | None = None,
        mask_token_id: int = LLADA_MASK_ID,
        dlm_block_length: int = 32,
        dlm_strategy: str = "threshold",
        dlm_max_canvas: int | None = None,
        dlm_stop_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        unsupported = {
            "attention_layer_norm": kwargs.get("attention_layer_norm"),
            "alibi": kwargs.get("alibi"),
            "scale_logits": kwargs.get("scale_logits"),
            "input_emb_norm": kwargs.get("input_emb_norm"),
            "include_qkv_bias": include_qkv_bias,
            "include_bias": include_bias,
        }
        if wrong := sorted(name for name, value in unsupported.items() if value):
            raise ValueError(
                f"this LLaDA config sets {', '.join(wrong)}, which no released LLaDA "
                "checkpoint uses and vllm-dlm does not implement"
            )
        self.hidden_size = d_model
        self.num_hidden_layers = n_layers
        self.num_attention_heads = n_heads
        self.num_key_value_heads = n_kv_heads or n_heads
        self.intermediate_size = mlp_hidden_size or mlp_ratio * d_model
        self.head_dim = d_model // n_heads
        self.hidden_act = "silu"
        self.max_position_embeddings = max_sequence_length
        # The embedding may be padded beyond the tokenizer's vocabulary.
        self.vocab_size = embedding_size or vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        self.attention_bias = False
        self.mlp_bias = False
        self.mask_token_id = mask_token_id
        self.dlm_class = "A"
        self.dlm_block_length = dlm_block_length
        self.dlm_strategy = dlm_strategy
        self.dlm_max_canvas = dlm_max_canvas
        if dlm_stop_ids is None:
            # <|eot_id|> is known to LLaDA's tokenizer only, not to its config.
            dlm_stop_ids = [LLADA_EOT_ID] if mask_token_id == LLADA_MASK_ID else []
        self.dlm_stop_ids = dlm_stop_ids
        # vLLM takes a model for a diffusion model exactly when this is set; the
        # engine's own limit is `--dlm-max-canvas`.
        self.canvas_length = dlm_block_length
        kwargs.setdefault("tie_word_embeddings", weight_tying)
        super().__init__(**kwargs)
