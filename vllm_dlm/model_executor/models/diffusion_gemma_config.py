# SPDX-License-Identifier: Apache-2.0
"""HF config of DiffusionGemma in our engine: the text model of a released config.

vLLM serves the released architecture itself, images included. With `--dlm-diffusion-
gemma engine` the engine's config becomes this one instead, whose architecture is ours:
what the released config says of the text model, and what our engine must know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import DiffusionGemmaTextConfig, PretrainedConfig

from vllm_dlm.config.model import NO_MASK, declare
from vllm_dlm.model_executor.models.reading import Family
from vllm_dlm.strategies.renoise import RenoiseParams

ARCHITECTURE = "DlmDiffusionGemma"

GENERATION_FIELDS = {
    "entropy_bound": "sampler_config.entropy_bound",
    "t_min": "t_min",
    "t_max": "t_max",
    "max_denoising_steps": "max_denoising_steps",
    "stability": "stability_threshold",
    "confidence": "confidence_threshold",
}
"""Parameter of `renoise` -> where generation_config.json has it."""

assert GENERATION_FIELDS.keys() == RenoiseParams.model_fields.keys()


class DiffusionGemmaEngineConfig(DiffusionGemmaTextConfig):
    """DiffusionGemma's text model, as our engine serves it."""

    model_type = "diffusion_gemma_text"
    family = Family("DiffusionGemma", (ARCHITECTURE,))


def served_by_our_engine(
    config: PretrainedConfig, overrides: Mapping[str, Any]
) -> PretrainedConfig:
    """The config of our engine for a released one; any other config as it is.

    Args:
        config: what config.json says.
        overrides: the user's `--hf-overrides`: fields of the text model, or of what a
            family declares.

    Raises:
        ValueError: it is a network that we have not.
    """
    if config.model_type != "diffusion_gemma":
        # The front end refuses the option then; vLLM asks of a dummy config, too.
        return config
    given = {**config.text_config.to_dict(), **overrides.get("text_config", {})}
    given |= {name: v for name, v in overrides.items() if name != "text_config"}
    if given.get("use_bidirectional_attention") == "all":
        raise ValueError(
            "use_bidirectional_attention 'all' in the DiffusionGemma config: vllm-dlm "
            "serves the model whose text is read causally; leave diffusion_gemma at "
            "'native'"
        )
    given.pop("architectures", None)
    declared = {
        name: given.pop(name) for name in list(given) if name.startswith("dlm_")
    }
    text: Any = DiffusionGemmaEngineConfig.from_dict(given)
    text.architectures = [ARCHITECTURE]
    # Full layers have no values of their own: these are their keys.
    text.attention_k_eq_v = True
    declare(
        text,
        declared,
        dlm_class="causal",
        dlm_noise="uniform",
        mask_token_id=NO_MASK,
        dlm_block_length=config.canvas_length,
        dlm_strategy="renoise",
        dlm_generation_fields=GENERATION_FIELDS,
        dlm_soft_inputs=True,
    )
    return text
