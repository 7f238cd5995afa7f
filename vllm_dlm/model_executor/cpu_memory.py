# SPDX-License-Identifier: Apache-2.0
"""How much memory the KV cache takes on a CPU, where the user does not say.

vLLM's default is a share of all memory, and it refuses to start where neighbours hold
some of that. What is served by this package, its built-in autoregressive models
included, takes what its requests can use instead.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import psutil
from vllm.logger import init_logger

from vllm_dlm.config.engine_keys import SWITCHING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

CPU_PAGE = 128
"""Tokens in a KV page on a CPU, unless the user says; the platform sets it."""


def size_kv_cache(vllm_config: VllmConfig) -> None:
    """Set `kv_cache_memory_bytes`, unless the user has said how much.

    It is enough for `max_num_seqs` requests of full context, but at most half of the
    memory that is free, divided by the ranks and by the engines of a pair.
    """
    cache, model_config = vllm_config.cache_config, vllm_config.model_config
    default = type(cache).__pydantic_fields__["gpu_memory_utilization"].default
    if (
        cache.kv_cache_memory_bytes is not None
        or cache.gpu_memory_utilization != default
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    ):
        return
    token_bytes = _token_bytes(vllm_config, model_config)
    speculative = vllm_config.speculative_config
    drafter = speculative and speculative.draft_model_config
    if drafter and drafter.model != model_config.model:
        token_bytes += _token_bytes(vllm_config, drafter)
    # Whole pages, and the one that vLLM keeps for itself.
    page = cache.block_size if cache.user_specified_block_size else CPU_PAGE
    pages = -(-model_config.max_model_len // page)
    tokens = (vllm_config.scheduler_config.max_num_seqs * pages + 1) * page
    engines = 2 if SWITCHING in (vllm_config.additional_config or {}) else 1
    ranks = vllm_config.parallel_config.tensor_parallel_size
    share = _free_bytes() // (2 * ranks * engines)
    cache.kv_cache_memory_bytes = min(tokens * token_bytes, share)
    logger.info(
        "KV cache: %.2f GiB, enough for %d tokens; --kv-cache-memory-bytes sets it.",
        cache.kv_cache_memory_bytes / 2**30,
        cache.kv_cache_memory_bytes // token_bytes,
    )


def _token_bytes(vllm_config: VllmConfig, model_config: Any) -> int:
    """Bytes of a token's keys and values on one rank."""
    parallel = vllm_config.parallel_config
    numbers: int = (
        2
        * model_config.get_num_layers(parallel)
        * model_config.get_num_kv_heads(parallel)
        * model_config.get_head_size()
    )
    size: int = model_config.dtype.itemsize
    return numbers * size


def _free_bytes() -> int:
    """What is free for this process, as vLLM will measure it in the worker.

    A container's limit counts there, which `psutil` does not know.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    node = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    return min(psutil.virtual_memory().available, node.available_memory)
