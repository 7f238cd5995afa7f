# SPDX-License-Identifier: Apache-2.0
"""Options of a vLLM server that a diffusion language model's engine would ignore."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SERVER_OPTIONS: dict[str, str] = {
    "--logits-processors": "model_config.logits_processors",
    "--enable-trace-replay": "model_config.enable_trace_replay",
    "--watermark-config": "watermark_config",
    "--kv-transfer-config": "kv_transfer_config",
    # It computes prompts by fewer layers: nothing of them is sampled.
    "--kv-sharing-fast-prefill": "cache_config.kv_sharing_fast_prefill",
    # A canvas is token ids.
    "--enable-prompt-embeds": "model_config.enable_prompt_embeds",
    "--kv-offloading-size": "cache_config.kv_offloading_size",
    # Step maps travel where these would.
    "--enable-return-routed-experts": "aux_output_config.enable_return_routed_experts",
    "--enable-dbo": "parallel_config.enable_dbo",
    "--enable-batch-sharded-sampling": "parallel_config.enable_batch_sharded_sampling",
}
"""Server options that the engine would ignore: flag -> where `VllmConfig` keeps it."""


def refuse_server_options(vllm_config: VllmConfig) -> None:
    """Refuse server options that the engine would ignore; for the config hook.

    Raises:
        ValueError: such an option is set.
    """
    for flag, path in SERVER_OPTIONS.items():
        if attrgetter(path)(vllm_config):
            raise ValueError(
                f"{flag} is not supported for diffusion language models; remove it"
            )
    model_config = vllm_config.model_config
    if model_config.runner_type == "pooling":
        raise ValueError(
            "--runner pooling and --convert are not supported for diffusion language "
            "models, which write text; remove them"
        )
    mode = model_config.logprobs_mode
    if mode != "raw_logprobs":
        raise ValueError(
            f"--logprobs-mode {mode} is not supported for diffusion language models; "
            "only raw_logprobs is"
        )
