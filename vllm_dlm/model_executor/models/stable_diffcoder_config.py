# SPDX-License-Identifier: Apache-2.0
"""HF config of Stable-DiffCoder-8B: a Llama that decodes in blocks of 4.

The released checkpoint has the model type of every Llama. Whatever has that type comes
here, and only what names the architecture of Stable-DiffCoder stays: all others become
the LlamaConfig that they would be without this package.
Source: ByteDance-Seed/Stable-DiffCoder, arXiv 2601.15892; field values follow a copy of
the released config and code in another project (Diffulex).
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from vllm_dlm.config.model import declare
from vllm_dlm.model_executor.models.config_fields import NAMES
from vllm_dlm.model_executor.models.declarations import fill
from vllm_dlm.model_executor.models.reading import Family, FamilyConfig, read

STABLE_DIFFCODER_ARCHITECTURES = ("StableDiffcoderForCausalLM",)
STABLE_DIFFCODER_MASK_ID = 5
"""`<[MASK_TOKEN]>`; the default of the released code."""


def is_stable_diffcoder(fields: dict[str, Any]) -> bool:
    """Whether a config.json with the model type of Llama is a Stable-DiffCoder's.

    `architectures` decides; without it, whose code `auto_map` names.
    """
    named, code = fields.get("architectures"), fields.get("auto_map")
    if named is None and isinstance(code, dict):
        named = [str(path).rpartition(".")[2] for path in code.values()]
    return NAMES.accepts(named) and not set(named or ()).isdisjoint(
        STABLE_DIFFCODER_ARCHITECTURES
    )


class StableDiffCoderConfig(FamilyConfig, LlamaConfig):
    """Stable-DiffCoder's configuration.

    The class of the model type `llama` while a server with that type runs: made of
    fields that are not its own, it is a plain LlamaConfig.
    """

    model_type = "llama"
    family = Family(
        "Stable-DiffCoder", STABLE_DIFFCODER_ARCHITECTURES, rope_theta=500000.0
    )

    def __new__(cls, **kwargs: Any) -> Any:
        """Its own config, or that of another Llama.

        Without fields, as Transformers makes a class's defaults, its own.
        """
        if kwargs and not is_stable_diffcoder(kwargs):
            return LlamaConfig(**kwargs)
        return super().__new__(cls)

    def __init__(self, **kwargs: Any) -> None:
        read(self.family, kwargs)
        fill(
            kwargs,
            vocab_size=155136,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            block_size=4,
        )
        declare(
            self,
            kwargs,
            dlm_class="block",
            mask_token_id=STABLE_DIFFCODER_MASK_ID,
            dlm_block_length=kwargs["block_size"],
            dlm_block_origin="start",
            dlm_strategy_config={"threshold": 0.95},
        )
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of a Stable-DiffCoder, or of another Llama."""
        if not is_stable_diffcoder(config_dict):
            return LlamaConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)
