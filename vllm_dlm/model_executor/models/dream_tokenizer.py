# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer without remote code: Qwen2's byte-level BPE under its name.

Dream, Dream-Coder and DiffuCoder ship vocab.json and merges.txt, and name a class of
their own in tokenizer_config.json; its text splitting and merges are Qwen2's.
"""

from __future__ import annotations

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's tokenizer; only the checkpoint's added tokens differ."""
