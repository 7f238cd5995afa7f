# SPDX-License-Identifier: Apache-2.0
"""Config hook that vLLM runs for our architectures (`MODELS_CONFIG_MAP`).

It turns "a Llama-shaped checkpoint with a mask token" into a vLLM configuration that
serves it right, so that a user sets no flag: our scheduler, synchronous stepping,
non-causal attention, no prefix caching (class A recomputes everything), and a token
budget that holds one whole prompt plus canvas.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_dlm.config import server_config
from vllm_dlm.model_defaults import ModelDefaults
from vllm_dlm.request import refuse_server_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

SCHEDULER = "vllm_dlm.model_executor.scheduler.DiffusionStepScheduler"


class DlmModelConfig(VerifyAndUpdateConfig):
    """Serving configuration of a diffusion language model."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Adapt `vllm_config` in place.

        Raises:
            ValueError: the user asked for something this model cannot do; the message
                says what to change.
        """
        from vllm.config.diffusion import DiffusionConfig

        model_config = vllm_config.model_config
        parallel = vllm_config.parallel_config
        scheduler = vllm_config.scheduler_config
        if vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative decoding does not apply to a diffusion language model: "
                "it writes many tokens per forward by itself; drop "
                "--speculative-config"
            )
        if parallel.pipeline_parallel_size > 1:
            raise ValueError(
                "pipeline parallelism is not supported for diffusion language models "
                "yet; use --tensor-parallel-size"
            )
        if parallel.decode_context_parallel_size > 1:
            raise ValueError(
                "decode context parallelism is not supported for diffusion language "
                "models; use --tensor-parallel-size"
            )

        refuse_server_options(vllm_config)

        # Validated here once and read by the API process at admission.
        server = server_config(vllm_config)
        hf_config = model_config.hf_config
        hf_config.dlm_server = server.model_dump()
        hf_config.canvas_length = server.canvas_limit(
            model_config.max_model_len,
            ModelDefaults.from_hf_config(hf_config).max_canvas,
        )
        # The canvas lives in the worker and does not travel as draft tokens, so the
        # speculative path that vLLM's own diffusion models use is kept at width 1.
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=1)

        # The references decode greedily unless told otherwise, and confidence rules
        # are tuned for that; `--override-generation-config` says otherwise.
        model_config.override_generation_config.setdefault("temperature", 0.0)

        scheduler.scheduler_cls = SCHEDULER
        # Which rows the next step computes depends on this step's outcome.
        scheduler.async_scheduling = False
        # Every position attends to every other: a prompt plus its canvas is one
        # forward, or it is wrong.
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0
        if scheduler.max_num_batched_tokens < model_config.max_model_len:
            logger.info(
                "Raising max_num_batched_tokens from %d to %d: a full-attention "
                "diffusion model computes a prompt and its canvas in one forward.",
                scheduler.max_num_batched_tokens,
                model_config.max_model_len,
            )
            scheduler.max_num_batched_tokens = model_config.max_model_len
        scheduler.max_num_scheduled_tokens = scheduler.max_num_batched_tokens
        # A page's KV changes with the canvas in every forward: nothing to share.
        vllm_config.cache_config.enable_prefix_caching = False
        vllm_config.attention_config.use_non_causal = True
        if current_platform.is_cpu():
            _size_cpu_kv_cache(vllm_config)


def _size_cpu_kv_cache(vllm_config: VllmConfig) -> None:
    """Take what the requests can use, not 92 % of the machine's memory.

    vLLM's default for a CPU is a share of all memory, and it refuses to start where
    neighbours hold some of it.
    """
    cache, model_config = vllm_config.cache_config, vllm_config.model_config
    default = type(cache).__pydantic_fields__["gpu_memory_utilization"].default
    if (
        cache.kv_cache_memory_bytes is not None
        or cache.gpu_memory_utilization != default
        or "VLLM_CPU_KVCACHE_SPACE" in os.environ
    ):
        return
    parallel = vllm_config.parallel_config
    token_bytes = (
        2
        * model_config.get_num_layers(parallel)
        * model_config.get_num_kv_heads(parallel)
        * model_config.get_head_size()
        * model_config.dtype.itemsize
    )
    tokens = vllm_config.scheduler_config.max_num_seqs * model_config.max_model_len
    share = psutil.virtual_memory().available // (2 * parallel.tensor_parallel_size)
    cache.kv_cache_memory_bytes = min(tokens * token_bytes, share)
    logger.info(
        "KV cache: %.2f GiB, enough for %d tokens; --kv-cache-memory-bytes sets it.",
        cache.kv_cache_memory_bytes / 2**30,
        cache.kv_cache_memory_bytes // token_bytes,
    )
