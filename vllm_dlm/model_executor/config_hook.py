# SPDX-License-Identifier: Apache-2.0
"""Config hook that vLLM runs for our architectures (`MODELS_CONFIG_MAP`).

It turns "a checkpoint with a mask token" into a vLLM configuration that serves it
right, so that a user sets no flag: our scheduler, asynchronous where that is free,
non-causal attention, CUDA graphs of a block's width; for full attention no prefix
caching and a token budget that holds one whole prompt plus canvas, for the others KV
pages made of whole blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_dlm.admission.options import check_strategy
from vllm_dlm.admission.server_options import refuse_server_options
from vllm_dlm.config.model import ModelDefaults, attention_of
from vllm_dlm.config.noise import check_canvas_length
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import RequestConfig, resolve, server_config
from vllm_dlm.model_executor.cpu_memory import size_kv_cache
from vllm_dlm.model_executor.generation_config import (
    check_stop_ids,
    read_generation_config,
    set_usual_sampling,
)
from vllm_dlm.model_executor.layout import GRAPH_SEGMENTS, usual_rows
from vllm_dlm.model_executor.lora.targets import choose_targets
from vllm_dlm.model_executor.models.declarations import check_declarations
from vllm_dlm.model_executor.running_ahead import loses_nothing, why_not_ahead
from vllm_dlm.model_executor.sampling.observers import OBSERVERS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

WIDEST_GRAPH = 512
"""Rows. vLLM captures no wider CUDA graphs by default, on most GPUs: the kernels of
longer forwards take longer than their launches."""

WIDEST_DEFAULT_CONTEXT = 8192
"""Positions; of full-attention models, where `--max-model-len` is not given."""

SCHEDULER = "vllm_dlm.model_executor.scheduling.scheduler.DiffusionStepScheduler"


class DlmModelConfig(VerifyAndUpdateConfig):
    """Serving configuration of a diffusion language model."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Adapt `vllm_config` in place.

        Raises:
            ValueError: the user asked for something this model cannot do; the message
                says what to change.
        """
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
        for kind in ("decode", "prefill"):
            if getattr(parallel, f"{kind}_context_parallel_size") > 1:
                raise ValueError(
                    f"{kind} context parallelism is not supported for diffusion "
                    "language models; use --tensor-parallel-size"
                )

        refuse_server_options(vllm_config)

        hf_config = model_config.hf_config
        check_declarations(hf_config)
        _name_modules(hf_config)
        choose_targets(vllm_config)
        _limit_context(model_config)
        read_generation_config(model_config)
        # Validated here once and read by the API process at admission.
        server = server_config(vllm_config)
        defaults = ModelDefaults.from_hf_config(hf_config)
        check_canvas_length(server, defaults)
        check_stop_ids(model_config)
        hf_config.dlm_server = server.model_dump()
        canvas = server.canvas_limit(model_config.max_model_len, defaults.max_canvas)
        hf_config.canvas_length = canvas
        plain = resolve(server, None, defaults).sized(canvas, canvas)
        check_strategy(plain, server, model_config)
        if (server.steps or server.steps_per_block) and not plain.follows_schedule:
            logger.info(
                "The server's steps are for requests of strategies that follow a step "
                "schedule; its own, %s, follows none.",
                plain.strategy,
            )
        set_usual_sampling(model_config)

        scheduler.scheduler_cls = SCHEDULER
        _schedule_ahead(vllm_config, plain, defaults, server)
        if defaults.reuses_blocks:
            _serve_blocks(vllm_config, defaults, server)
        else:
            _serve_full_attention(vllm_config, server)
        scheduler.max_num_scheduled_tokens = scheduler.max_num_batched_tokens
        _serve_graphs(
            vllm_config, usual_rows(plain, defaults, blocks=server.async_blocks)
        )
        vllm_config.attention_config.use_non_causal = True
        # vLLM's warm-up of kernels, on a GPU and since 0.33 on a CPU, schedules what
        # our models do not serve: one row with a draft, grammars, log-probabilities of
        # a prompt. Kernels are compiled when they are first used.
        vllm_config.kernel_config.enable_jit_warmup = False
        if current_platform.is_cpu():
            size_kv_cache(vllm_config)


def _schedule_ahead(
    vllm_config: VllmConfig,
    plain: RequestConfig,
    defaults: ModelDefaults,
    server: DlmConfig,
) -> None:
    """Decide on asynchronous scheduling: vLLM's own flag, or its own choice.

    Left to us, it is on where no forward is computed in vain, but for a CPU, which has
    no device to hide the host's work behind.

    Args:
        plain: options of a request without its own.

    Raises:
        ValueError: the user asked for it, and nothing could be scheduled ahead.
    """
    scheduler = vllm_config.scheduler_config
    reason = why_not_ahead(plain, defaults, server, OBSERVERS)
    if scheduler.async_scheduling and reason is not None:
        raise ValueError(
            f"--async-scheduling has no effect with {reason}; or leave it out"
        )
    if scheduler.async_scheduling is None:
        is_free = reason is None and loses_nothing(plain, defaults, server)
        if current_platform.is_cpu() or not is_free:
            scheduler.async_scheduling = False
    if server.async_blocks == 1:
        return
    if defaults.attention != "block" or defaults.leads_blocks:
        raise ValueError(
            "async_blocks 2 is for block-causal models without leads: with this model "
            "no forward is lost; leave it out"
        )
    if scheduler.async_scheduling is False:
        raise ValueError(
            "async_blocks 2 has no effect on a server that schedules synchronously: "
            "pass --async-scheduling, or leave it out"
        )


def _limit_context(model_config: ModelConfig) -> None:
    """Serve a context that one forward of a full-attention model can hold.

    Dream's config says 131072, and nobody who sets no length wants forwards that wide.
    """
    is_asked_for = model_config.original_max_model_len not in (None, -1)
    if (
        attention_of(model_config.hf_config) == "full"
        and not is_asked_for
        and model_config.max_model_len > WIDEST_DEFAULT_CONTEXT
    ):
        logger.info(
            "Context length %d instead of the config's %d: a full-attention diffusion "
            "model computes all of it in one forward; --max-model-len sets it.",
            WIDEST_DEFAULT_CONTEXT,
            model_config.max_model_len,
        )
        model_config.max_model_len = WIDEST_DEFAULT_CONTEXT


def _name_modules(hf_config: Any) -> None:
    """Let a quantised checkpoint's lists of modules name them as vLLM does."""
    names = hf_config.family.module_names
    quantisation = getattr(hf_config, "quantization_config", None)
    if names is not None and isinstance(quantisation, dict):
        hf_config.quantization_config = names.translate(
            quantisation, hf_config.num_hidden_layers
        )


def _serve_full_attention(vllm_config: VllmConfig, server: DlmConfig) -> None:
    """Full attention: every position attends to every other.

    A prompt plus its canvas is one forward, or it is wrong; and a page's KV changes
    with the canvas in every forward: there is nothing to share.

    Raises:
        ValueError: an option that speaks of final KV.
    """
    if server.commit != "fused":
        raise ValueError(
            f"commit {server.commit!r} is for block-causal models: with full attention "
            "no block's KV is ever final; leave it at 'fused'"
        )
    scheduler = vllm_config.scheduler_config
    max_model_len = vllm_config.model_config.max_model_len
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    if scheduler.max_num_batched_tokens < max_model_len:
        logger.info(
            "Raising max_num_batched_tokens from %d to %d: a full-attention diffusion "
            "model computes a prompt and its canvas in one forward.",
            scheduler.max_num_batched_tokens,
            max_model_len,
        )
        scheduler.max_num_batched_tokens = max_model_len
    vllm_config.cache_config.enable_prefix_caching = False


def _serve_blocks(
    vllm_config: VllmConfig, defaults: ModelDefaults, server: DlmConfig
) -> None:
    """Block and causal attention: finished blocks keep their KV, which may be shared.

    Raises:
        ValueError: pages that do not hold whole blocks.
    """
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    length = int(server.block_length or defaults.block_length)
    # The block before the active one is computed along with it.
    least = min(2 * length, vllm_config.model_config.max_model_len)
    if scheduler.max_num_batched_tokens < least:
        raise ValueError(
            f"max_num_batched_tokens {scheduler.max_num_batched_tokens} does not hold "
            f"two blocks of {length}: set it to at least {least}"
        )
    if scheduler.long_prefill_token_threshold:
        scheduler.long_prefill_token_threshold = max(
            scheduler.long_prefill_token_threshold, least
        )
    # Several blocks that a request decides together are computed along with the ones
    # before, too: `admission/options.py`.
    most = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
    hf_config = vllm_config.model_config.hf_config
    hf_config.dlm_longest_span = min(most, scheduler.max_num_batched_tokens) // 2
    if defaults.attention == "causal":
        _choose_causal_backend(vllm_config)
    if defaults.attention == "block" and defaults.block_origin == "prompt":
        # What a token sees depends on the length of its prompt, which no hash covers.
        cache.enable_prefix_caching = False
    if defaults.attention != "block" or not cache.enable_prefix_caching:
        return
    # A page's hash covers the page: KV that depends on tokens of the next page must
    # not be found by it.
    if not cache.user_specified_block_size:
        usual = 128 if current_platform.is_cpu() else cache.DEFAULT_BLOCK_SIZE
        if usual % length:
            unit = 32 if current_platform.is_cpu() else 16
            cache.block_size = math.lcm(unit, length)
            cache.user_specified_block_size = True
    elif cache.block_size % length:
        raise ValueError(
            f"--block-size {cache.block_size} (tokens in a KV page) is not a multiple "
            f"of this model's block length {length}, so prefix caching could share KV "
            f"that depends on other tokens: set --block-size "
            f"{math.lcm(cache.block_size, length)}, leave it out, or pass "
            "--no-enable-prefix-caching"
        )


def _serve_graphs(vllm_config: VllmConfig, width: int | None) -> None:
    """Let vLLM capture whole CUDA graphs, if the usual step has a width.

    vLLM takes `canvas_length` for the rows that each request has in the steps of which
    it captures graphs, and also for a number of draft tokens. Our canvas lives in the
    worker, and no draft tokens travel; but vLLM allocates, for each of them and each
    request that may run, a bit for each token of the vocabulary (and would reserve
    pages with KV transfer, which is refused). So the number is 1 where no such graph is
    captured, as on a CPU.

    Args:
        width: rows of a request's usual step; None if they differ from step to step.
    """
    from vllm.config.diffusion import DiffusionConfig

    vllm_config.diffusion_config = DiffusionConfig(canvas_length=1)
    compilation = vllm_config.compilation_config
    scheduler = vllm_config.scheduler_config
    mode = compilation.cudagraph_mode
    if (
        not current_platform.support_static_graph_mode()
        or vllm_config.model_config.enforce_eager
        or (mode is not None and not mode.has_full_cudagraphs())
    ):
        return
    most = min(WIDEST_GRAPH, scheduler.max_num_batched_tokens)
    if width is None or not GRAPH_SEGMENTS <= width <= most:
        return
    vllm_config.diffusion_config = DiffusionConfig(canvas_length=width)
    asked_for = (
        compilation.cudagraph_capture_sizes,
        compilation.max_cudagraph_capture_size,
    )
    if asked_for == (None, None):
        # A block's first step may have twice the rows, in piecewise graphs.
        most = min(most, 2 * width * scheduler.max_num_seqs)
        compilation.cudagraph_capture_sizes = graph_sizes(width, most)


def graph_sizes(width: int, most: int) -> list[int]:
    """Rows that CUDA graphs are captured for: multiples of `width`, rising, to `most`.

    From eight on, each is at most a quarter above the one before, so that a forward is
    padded by less than that.

    Args:
        width: rows of one request, at most `most`.
    """
    sizes, count = [], 1
    while count * width <= most:
        sizes.append(count * width)
        count += max((1 << count.bit_length()) // 8, 1)
    return sizes


def _choose_causal_backend(vllm_config: VllmConfig) -> None:
    """Causal attention mixes causal and non-causal rows of attention in a forward.

    On a GPU, vLLM's Triton backend does; FlashAttention before version 4 and FlashInfer
    take one or the other. (The CPU's does too.)
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    if current_platform.is_cuda_alike() and attention.backend is None:
        logger.info("Using the attention backend TRITON_ATTN: rows differ in causality")
        attention.backend = AttentionBackendEnum.TRITON_ATTN
