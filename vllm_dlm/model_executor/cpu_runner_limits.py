# SPDX-License-Identifier: Apache-2.0
"""What model runner V2 does by kernels that nothing replaces on a CPU without Triton.

An engine or a request that asks for such a feature is refused, before a launch ends the
engine in the middle of other requests. Model runner V1, vLLM's choice there, has most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_dlm.config.engine_keys import SPECULATION

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


def unreplaced_features(vllm_config: VllmConfig) -> list[str]:
    """What this engine is asked for and cannot do on V2 here, in words."""
    model: Any = vllm_config.model_config
    found = []
    if model.is_hybrid:
        found.append("models with a recurrent state")
    if model.uses_mrope:
        found.append("positions of several dimensions (M-RoPE)")
    for name in ("enable_prompt_embeds", "enable_trace_replay", "return_sampling_mask"):
        if getattr(model, name, False):
            found.append(name)
    if getattr(vllm_config, "watermark_config", None) is not None:
        found.append("watermarks")
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1:
        found.append("decode context parallelism")
    if parallel.enable_batch_sharded_sampling:
        found.append("batch-sharded sampling")
    return found + _of_speculation(vllm_config)


def refuse_thinking_budget(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Refuse a request whose thinking a kernel would have to end.

    Raises:
        VLLMValidationError: HTTP 400.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.triton_utils import HAS_TRITON

    if (
        params.thinking_token_budget is not None
        and not HAS_TRITON
        and vllm_config.use_v2_model_runner
    ):
        raise VLLMValidationError(
            "thinking_token_budget: model runner V2 cannot end a model's thinking on a "
            "CPU without Triton; start the engine without VLLM_USE_V2_MODEL_RUNNER"
        )


def _of_speculation(vllm_config: VllmConfig) -> list[str]:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return []
    found = []
    own = vllm_config.additional_config
    if not (isinstance(own, dict) and SPECULATION in own):
        found.append(f"vLLM's speculative method {speculative.method!r}")
    if speculative.enable_adaptive_verification:
        found.append("adaptive verification")
    verification = speculative.rejection_sample_method
    if verification not in ("standard", "synthetic"):
        found.append(f"rejection_sample_method {verification!r}")
    return found
