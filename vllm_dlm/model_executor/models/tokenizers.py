# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of families for which transformers would need remote code."""

from __future__ import annotations

from vllm_dlm.model_executor.models.tables import HF_CONFIGS, TOKENIZERS
from vllm_dlm.registry import load


def register_tokenizers() -> None:
    """Have transformers' AutoTokenizer find them; once or often."""
    from transformers import AutoTokenizer

    for model_type, target in TOKENIZERS.items():
        AutoTokenizer.register(
            load(HF_CONFIGS[model_type]), tokenizer_class=load(target), exist_ok=True
        )
