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
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import get_layers_from_vllm_config
from vllm.config.utils import replace
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
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

from vllm_dlm.config.engine_keys import RUNNER
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

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class DiffusionNetwork:
    """The part of a drafter that is about the network, on either model runner.

    The class beside it (`proposer.py`, `speculator.py`) sets what is declared here
    before it calls `set_up`, and says which pages requests have.

    `counts`: "forwards"; their "rows"; "head_rows", those whose logits are read.
    """

    vllm_config: VllmConfig
    device: torch.device
    options: Any
    counts: Counter[str]
    max_num_tokens: int
    """Of a step of the target."""

    model: Any
    """The drafter, once it is loaded."""

    def reserved(self) -> np.ndarray:
        """[R]: positions for which the requests of the step have pages."""
        raise NotImplementedError

    def page_table(self, requests: np.ndarray, width: int) -> np.ndarray:
        """[R, width] int32: the first pages of these rows of the batch."""
        raise NotImplementedError

    def set_up(self, vllm_config: VllmConfig) -> None:
        """Check that the drafter can draft here; called before anything is loaded.

        Raises:
            ValueError: it cannot.
        """
        speculative = vllm_config.speculative_config
        draft = speculative.draft_model_config
        self.most_masks: int = speculative.num_speculative_tokens
        self.most_requests: int = vllm_config.scheduler_config.max_num_seqs
        self.defaults = check_drafter(draft.hf_config, self.most_masks)
        check_declarations(draft.hf_config)
        _refuse_parallelism(vllm_config, draft)
        reason = self._why_not_cached(vllm_config.cache_config.block_size)
        self.context = context_of(self.options.context, reason)
        logger.info(
            "DEER: %s drafts up to %d tokens at once; context %r%s",
            draft.model,
            self.most_masks,
            self.context,
            f": {reason}." if reason else ".",
        )
        self.vocab_size = draft.get_vocab_size()
        longest = vllm_config.model_config.max_model_len
        self.longest = min(longest, draft.max_model_len)
        """Positions that the drafter knows."""
        self.most_rows = max(
            self.max_num_tokens,
            self.longest
            if self.context == "recompute"
            else self.defaults.block_length + self.most_masks,
        )
        """Rows of a forward; a request with more goes alone."""
        self.page_group = -1
        """Which group of KV pages is the drafter's; -1 for none."""

    @cached_property
    def draft_config(self) -> VllmConfig:
        """The configuration that the drafter is built and run with."""
        target, speculative = self.vllm_config, self.vllm_config.speculative_config
        draft = speculative.draft_model_config
        # vLLM's mark. Our hook (`config_hook.py`) is for models that are served: it
        # would put our scheduler into the target's configuration.
        draft.config_updated = True
        # The backend is the drafter's own: it attends otherwise than the target.
        backend = None
        if self.defaults.attention == "causal" and current_platform.is_cuda_alike():
            # Text and masks differ in causality.
            backend = AttentionBackendEnum.TRITON_ATTN
        # Layers and experts are found by name in these, and experts also by order.
        compilation = copy.copy(target.compilation_config)
        compilation.static_forward_context = {}
        compilation.static_all_moe_layers = []
        return replace(
            target,
            model_config=draft,
            quant_config=None,
            parallel_config=replace(
                speculative.draft_parallel_config, rank=target.parallel_config.rank
            ),
            attention_config=replace(
                target.attention_config, backend=backend, use_non_causal=True
            ),
            compilation_config=compilation,
            # vLLM refuses a diffusion model on V1, and knows nothing of this one.
            additional_config={**target.additional_config, RUNNER: 2},
        )

    @cached_property
    def layers(self) -> dict[str, Attention]:
        """The drafter's attention layers, by name."""
        return get_layers_from_vllm_config(self.draft_config, Attention)

    def load_network(self) -> None:
        """Load the drafter, and enter its layers where they need pages of requests."""
        with set_model_tag("draft_model"):
            self.model = get_model(vllm_config=self.draft_config, prefix="draft_model")
        if self.context == "cached":
            context = self.vllm_config.compilation_config.static_forward_context
            context.update(self.layers)

    @property
    def paged_layers(self) -> set[str]:
        """Names of the layers whose keys outlive a forward."""
        return set(self.layers) if self.context == "cached" else set()

    def use_pages(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None
    ) -> AttentionGroup:
        """Prepare attention over the drafter's pages, which vLLM has sized.

        Raises:
            ValueError: pages of a size that the drafter's blocks do not fit into.
        """
        if self.context == "recompute":
            self.group = self._scratch
            return self.group
        groups = kv_cache_config.kv_cache_groups
        self.page_group = next(
            index
            for index, group in enumerate(groups)
            if not self.paged_layers.isdisjoint(group.layer_names)
        )
        spec = groups[self.page_group].kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.kv_cache_specs[min(self.layers)]
        # vLLM may have changed its mind about the size of pages since the start.
        context_of("cached", self._why_not_cached(spec.block_size))
        kernel_block_size = None
        if kernel_block_sizes is not None:
            kernel_block_size = kernel_block_sizes[self.page_group]
        self.group = self._attention_group(spec, kernel_block_size)
        return self.group

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
            kv_cache_group_id=self.page_group,
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
        pages = -(-self.most_rows // spec.block_size) + self.most_requests
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
    def profile(self, num_tokens: int) -> None:
        """A forward without attention, for vLLM's memory profile and compilation."""
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
        group, segments = self.group, plan.segments
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
            return self.page_table(plan.requests, width)
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
