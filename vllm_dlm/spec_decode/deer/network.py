# SPDX-License-Identifier: Apache-2.0
"""The network of a diffusion drafter inside vLLM: loading it, its KV pages, a forward.

It is one of our model classes, loaded as vLLM loads a draft model, but into a forward
context of its own: what vLLM's runner finds in the target's are the layers that need
pages of requests. With context "cached" these are put there. With "recompute" no key
outlives a forward, and all layers share one set of scratch pages, as many as the
largest forward needs. All else is the same for both.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    UniformTypeKVCacheSpecs,
    compute_layout_strides,
)
from vllm.v1.worker.utils import (
    AttentionGroup,
    allocate_kv_cache,
    customize_attention_spec,
    select_common_block_size,
)

from vllm_dlm.model_executor.models.declarations import check_declarations
from vllm_dlm.model_executor.models.tables import ARCHITECTURES
from vllm_dlm.model_executor.planning.block_rows import upload
from vllm_dlm.registry import load
from vllm_dlm.spec_decode.deer.drafting import (
    Plan,
    check_drafter,
    context_of,
    why_not_cached,
)
from vllm_dlm.spec_decode.drafter import Drafter
from vllm_dlm.spec_decode.options import Deer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class DiffusionDrafter(Drafter):
    """Base of `DeerProposer`: all that is about the network, nothing about drafts.

    `counts`: "forwards"; their "rows"; "head_rows", those whose logits are read.
    """

    options: Deer

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        draft = vllm_config.speculative_config.draft_model_config
        self.defaults = check_drafter(
            draft.hf_config, vllm_config.speculative_config.num_speculative_tokens
        )
        check_declarations(draft.hf_config)
        _refuse_parallelism(vllm_config, draft)
        super().__init__(vllm_config, device, runner)
        reason = self._why_not_cached(vllm_config.cache_config.block_size)
        self.context = context_of(self.options.context, reason)
        logger.info(
            "DEER: %s drafts up to %d tokens at once; context %r%s",
            draft.model,
            self.num_speculative_tokens,
            self.context,
            f": {reason}." if reason else ".",
        )
        self.vocab_size = draft.get_vocab_size()
        self.longest = min(self.max_model_len, draft.max_model_len)
        """Positions that the drafter knows."""
        self.most_rows = max(
            self.max_num_tokens,
            self.longest
            if self.context == "recompute"
            else self.defaults.block_length + self.num_speculative_tokens,
        )
        """Rows of a forward; a request with more goes alone."""

    @cached_property
    def draft_config(self) -> VllmConfig:
        """The configuration that the drafter is built and run with."""
        # vLLM's mark. Our hook (`config_hook.py`) is for models that are served: it
        # would put our scheduler into the target's configuration.
        self.draft_model_config.config_updated = True
        base = super()._create_draft_vllm_config()
        attention = replace(base.attention_config, use_non_causal=True)
        if self.defaults.attention == "causal" and current_platform.is_cuda_alike():
            # Text and masks differ in causality.
            attention.backend = attention.backend or AttentionBackendEnum.TRITON_ATTN
        # Layers and experts are found by name in these, and experts also by order.
        compilation = copy.copy(base.compilation_config)
        compilation.static_forward_context = {}
        compilation.static_all_moe_layers = []
        return replace(base, attention_config=attention, compilation_config=compilation)

    def _create_draft_vllm_config(self) -> VllmConfig:
        return self.draft_config

    @cached_property
    def layers(self) -> dict[str, Attention]:
        """The drafter's attention layers, by name."""
        return get_layers_from_vllm_config(self.draft_config, Attention)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter; called by vLLM once the target is loaded."""
        self.model = self._get_model()
        self.supports_mm_inputs = False
        self._draft_attn_layer_names = set()
        if self.context == "cached":
            self._draft_attn_layer_names = set(self.layers)
            self.vllm_config.compilation_config.static_forward_context.update(
                self.layers
            )

    def initialize_attn_backend(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int] | None = None,
    ) -> None:
        """Prepare attention over the drafter's pages; called when vLLM has sized them.

        Raises:
            ValueError: pages of a size that the drafter's blocks do not fit into.
        """
        if self.context == "recompute":
            self.draft_attn_groups = [self._scratch]
            return
        groups = kv_cache_config.kv_cache_groups
        self.kv_cache_gid = next(
            index
            for index, group in enumerate(groups)
            if not self._draft_attn_layer_names.isdisjoint(group.layer_names)
        )
        spec = groups[self.kv_cache_gid].kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.kv_cache_specs[min(self.layers)]
        # vLLM may have changed its mind about the size of pages since the start.
        context_of("cached", self._why_not_cached(spec.block_size))
        kernel_block_size = None
        if kernel_block_sizes is not None:
            kernel_block_size = kernel_block_sizes[self.kv_cache_gid]
        self.draft_attn_groups = [self._attention_group(spec, kernel_block_size)]

    def _why_not_cached(self, page_size: int) -> str:
        shares_pages = bool(self.vllm_config.cache_config.enable_prefix_caching)
        return why_not_cached(self.defaults, page_size, shares_pages)

    def _attention_group(
        self, spec: Any, kernel_block_size: int | None
    ) -> AttentionGroup:
        group = AttentionGroup(
            backend=self._backend,
            layer_names=sorted(self.layers),
            kv_cache_spec=spec,
            kv_cache_group_id=self.kv_cache_gid,
        )
        group.create_metadata_builders(
            self.draft_config, self.device, kernel_block_size
        )
        return group

    @property
    def _backend(self) -> Any:
        return next(iter(self.layers.values())).get_attn_backend()

    @cached_property
    def _scratch(self) -> AttentionGroup:
        """Pages of one forward, which every layer overwrites in its turn."""
        backend = self._backend
        # Our families' layers are all alike.
        spec = next(iter(self.layers.values())).get_kv_cache_spec(self.draft_config)
        spec = customize_attention_spec(backend, spec)
        spec = spec.copy_with_new_block_size(
            select_common_block_size(spec.block_size, [backend], [spec])
        )
        pages = -(-self.most_rows // spec.block_size) + self.max_batch_size
        layout = self.draft_config.cache_config.get_resolved_kv_cache_layout()
        supported = backend.supported_kv_cache_layouts()
        if supported is not None and layout not in supported:
            layout = supported[0]
        layer_stride, block_stride, *_ = compute_layout_strides(spec, pages, 1, layout)
        name = min(self.layers)
        tensor = KVCacheTensor(
            size=pages * spec.page_size_bytes,
            layers=[name],
            layer_stride=layer_stride,
            block_stride=block_stride,
        )
        config = KVCacheConfig(
            num_blocks=pages,
            kv_cache_tensors=[tensor],
            kv_cache_groups=[KVCacheGroupSpec([name], spec)],
        )
        keys_and_values = allocate_kv_cache(config, self.device, layout)[name]
        for layer in self.layers.values():
            layer.bind_kv_cache(keys_and_values)
        return self._attention_group(spec, None)

    @torch.inference_mode()
    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: Any = None,
    ) -> None:
        """A forward without attention, for vLLM's memory profile and compilation."""
        if is_graph_capturing:
            return  # rows of a round differ too much for graphs
        if num_tokens >= self.max_num_tokens:
            num_tokens = self.most_rows
        if self.context == "recompute":
            _ = self._scratch  # a part of the memory profile
        empty = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        self._forward(empty, empty, None, None)

    def denoise(self, plan: Plan, token_ids: np.ndarray) -> torch.Tensor:
        """Compute one forward of the drafter.

        Args:
            token_ids: [rows of the batch, positions], the texts.

        Returns:
            [M, H]: hidden states of the rows that predict the masks.
        """
        group, segments = self.draft_attn_groups[0], plan.segments
        page_size = group.kv_cache_spec.block_size
        ids = token_ids[plan.requests[plan.owners], plan.positions]
        pages = self._pages(plan, page_size)
        blocks = pages[plan.owners, plan.positions // page_size].astype(np.int64)
        tokens, positions, slots, rows, starts, lengths, table, causal = upload(
            self.device,
            np.where(plan.is_mask, self.defaults.mask_token_id, ids),
            plan.positions,
            blocks * page_size + plan.positions % page_size,
            plan.logits_rows,
            segments.query_start_loc,
            segments.kv_lens,
            pages[segments.request],
            np.zeros(0) if plan.causal is None else plan.causal,
        )
        metadata = group.build_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts.int(),
                query_start_loc_cpu=torch.from_numpy(segments.query_start_loc),
                seq_lens=lengths.int(),
                num_reqs=len(segments.request),
                num_actual_tokens=len(tokens),
                max_query_len=int(np.diff(segments.query_start_loc).max()),
                max_seq_len=int(segments.kv_lens.max()),
                block_table_tensor=table.int(),
                slot_mapping=slots,
                causal=False if plan.causal is None else causal.int(),
            )
        )
        hidden = self._forward(tokens, positions, metadata, slots)
        self.counts.update(forwards=1, rows=len(tokens), head_rows=len(rows))
        return hidden[rows]

    def _pages(self, plan: Plan, page_size: int) -> np.ndarray:
        """[R, W] int32: the pages that hold each request's keys and values."""
        width = -(-int(plan.segments.kv_lens.max()) // page_size)
        if self.context == "cached":
            table = self.runner.input_batch.block_table[self.kv_cache_gid]
            own: np.ndarray = table.get_numpy_array()[plan.requests, :width]
            return own
        ends = np.zeros(len(plan.requests), np.int64)
        np.maximum.at(ends, plan.segments.request, plan.segments.kv_lens)
        counts = -(-ends // page_size)
        first = np.cumsum(counts) - counts
        scratch: np.ndarray = (first[:, None] + np.arange(width)).astype(np.int32)
        return scratch

    def _forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        metadata: Any,
        slots: torch.Tensor | None,
    ) -> torch.Tensor:
        """[N, H]; without metadata attention gives zeros."""
        of_layers = None if metadata is None else dict.fromkeys(self.layers, metadata)
        with set_forward_context(
            of_layers,
            self.draft_config,
            num_tokens=len(tokens),
            slot_mapping={} if slots is None else dict.fromkeys(self.layers, slots),
        ):
            hidden: torch.Tensor = self.model(
                input_ids=tokens.int(), positions=positions, inputs_embeds=None
            )
        return hidden


def _refuse_parallelism(vllm_config: VllmConfig, draft: Any) -> None:
    """Refuse what the drafter's forwards cannot follow.

    Raises:
        ValueError: context or data parallelism, or experts without their group.
    """
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1:
        raise ValueError(
            "speculative method 'deer' does not support decode context parallelism; "
            "use --tensor-parallel-size"
        )
    if parallel.data_parallel_size > 1 and draft.is_moe:
        raise ValueError(
            "speculative method 'deer' with a mixture of experts as drafter does not "
            "support data parallelism: ranks run different numbers of its forwards; "
            "use a dense drafter or --tensor-parallel-size"
        )
    network = load(ARCHITECTURES[draft.architecture])
    if issubclass(network, Qwen3MoeForCausalLM) and not vllm_config.model_config.is_moe:
        raise ValueError(
            f"a {draft.architecture} drafts only for a mixture of experts: vLLM makes "
            "the group of expert ranks that it needs for such targets only; use a "
            "dense drafter"
        )
