# SPDX-License-Identifier: Apache-2.0
"""DEER in vLLM: loading a diffusion drafter, its KV pages, and one forward a round.

The drafter is one of our model classes, loaded as vLLM loads a draft model, but into a
forward context of its own: what vLLM's runner finds in the target's are the layers that
need pages of requests. With context "cached" these are put there. With "recompute" no
key outlives a forward, so that all layers share one set of scratch pages, of a size
for the largest forward. Everything else is the same for both.
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

from vllm_dlm.model_executor.logits import tile_rows
from vllm_dlm.model_executor.models.declarations import check_declarations
from vllm_dlm.model_executor.segments import ragged, upload
from vllm_dlm.spec_decode.deer import (
    Plan,
    check_drafter,
    context_of,
    first_rows,
    greedy_drafts,
    plan_forward,
    split,
)
from vllm_dlm.spec_decode.drafter import Batch, Drafter, Drafts
from vllm_dlm.spec_decode.options import Deer
from vllm_dlm.spec_decode.sampling import draw_drafts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class DeerProposer(Drafter):
    """Drafts k tokens in one denoising step of a diffusion model.

    `counts`: "forwards"; their "rows"; "head_rows", those that went through lm_head.
    """

    options: Deer

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        speculative = vllm_config.speculative_config
        hf_config = speculative.draft_model_config.hf_config
        self.defaults = check_drafter(hf_config, speculative.num_speculative_tokens)
        check_declarations(hf_config)
        _refuse_parallelism(vllm_config, speculative.draft_model_config)
        super().__init__(vllm_config, device, runner)
        cache = vllm_config.cache_config
        self.context = context_of(
            self.options.context,
            self.defaults,
            cache.block_size,
            bool(cache.enable_prefix_caching),
        )
        self._vocab_size = self.draft_model_config.get_vocab_size()
        self.longest = min(self.max_model_len, self.draft_model_config.max_model_len)
        """Positions that the drafter knows."""
        self.most_rows = max(
            self.max_num_tokens,
            self.longest
            if self.context == "recompute"
            else self.defaults.block_length + self.num_speculative_tokens,
        )
        """Rows of a forward; a longer request goes alone."""
        logger.info(
            "DEER: %s drafts up to %d tokens at once (class %s, context %s).",
            self.draft_model_config.model,
            self.num_speculative_tokens,
            self.defaults.model_class,
            self.context,
        )

    # -- loading -----------------------------------------------------------

    @cached_property
    def draft_config(self) -> VllmConfig:
        """The configuration that the drafter is built and run with."""
        # vLLM's mark. Our hook (`config_hook.py`) is for models that are served: it
        # would put our scheduler into the target's configuration.
        self.draft_model_config.config_updated = True
        base = super()._create_draft_vllm_config()
        attention = replace(base.attention_config, use_non_causal=True)
        if self.defaults.model_class == "C" and current_platform.is_cuda_alike():
            # Text and masks differ in causality.
            attention.backend = attention.backend or AttentionBackendEnum.TRITON_ATTN
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
        context_of(
            "cached",
            self.defaults,
            spec.block_size,
            bool(self.vllm_config.cache_config.enable_prefix_caching),
        )
        kernel_block_size = (kernel_block_sizes or {self.kv_cache_gid: None})[
            self.kv_cache_gid
        ]
        self.draft_attn_groups = [self._attention_group(spec, kernel_block_size)]

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

    # -- drafting ----------------------------------------------------------

    def draft(self, batch: Batch) -> Drafts:
        """One denoising step for all requests, in as few forwards as rows allow."""
        starts, ends, widths = self._work(batch)
        rows = np.flatnonzero(ends > starts)
        tokens: list[list[int]] = [[] for _ in batch.request_ids]
        probs = None
        if not batch.sampling.all_greedy and widths.any():
            shape = (len(widths), int(widths.max()), self._vocab_size)
            probs = torch.zeros(shape, dtype=torch.float32, device=self.device)
        drawn = []
        for part in split((ends + widths - starts)[rows], self.most_rows):
            some = rows[part]
            plan = plan_forward(
                self.defaults, some, starts[some], ends[some], widths[some]
            )
            hidden = self._denoise(batch, plan)
            if len(plan.logits_rows):
                drawn.append(self._draw(batch, hidden, some, widths[some], probs))
        if drawn:
            flat = torch.cat(drawn).tolist()
            for row, last in zip(rows, np.cumsum(widths[rows]), strict=True):
                tokens[row] = flat[last - widths[row] : last]
        return Drafts(tokens, probs)

    def _work(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[R] each: first position to compute, end of the text, masks behind it."""
        attention = batch.attention
        # Tokens that the target has computed, and those of them in this step.
        computed = attention.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        new = np.diff(attention.query_start_loc_cpu.numpy()).astype(np.int64)
        # Only the token just sampled may be missing: else it is a part of a prompt.
        is_last = computed == batch.num_tokens - 1
        widths = np.where(is_last, batch.limits, 0)
        widths = np.clip(self.longest - batch.num_tokens, 0, widths)
        if self.context == "recompute":
            ends = np.where(widths > 0, batch.num_tokens, 0)
            return np.zeros_like(ends), ends, widths
        # vLLM reserves a page less than the masks need where they end behind one.
        table = self.runner.input_batch.block_table[self.kv_cache_gid]
        reserved = table.num_blocks_per_row[: len(widths)] * table.block_size
        widths = np.clip(reserved - batch.num_tokens, 0, widths)
        ends = np.where(widths > 0, batch.num_tokens, computed)
        ends = np.minimum(ends, self.longest)
        return first_rows(self.defaults, computed - new), ends, widths

    def _denoise(self, batch: Batch, plan: Plan) -> torch.Tensor:
        """[M, H]: hidden states of the rows that predict the drafts."""
        group, segments = self.draft_attn_groups[0], plan.segments
        page_size = group.kv_cache_spec.block_size
        ids = batch.token_ids[plan.requests[plan.owners], plan.positions]
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

    def _draw(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        rows: np.ndarray,
        widths: np.ndarray,
        probs: torch.Tensor | None,
    ) -> torch.Tensor:
        """[M] int64: a token for each row of hidden states [M, H]; fills in `probs`.

        Args:
            rows: [R] rows of the batch, whose `widths` [R] add up to M.
        """
        mask_id = self.defaults.mask_token_id
        step = tile_rows(self._vocab_size, hidden.dtype, hidden.device)
        tiles = [slice(i, i + step) for i in range(0, len(hidden), step)]
        if probs is None:
            return torch.cat(
                [greedy_drafts(self._logits(hidden[tile]), mask_id) for tile in tiles]
            )
        owners, offsets = ragged(widths)
        requests = rows[owners]
        positions = batch.num_tokens[requests] + offsets
        of_row, offsets, seeds, positions, top_k = upload(
            self.device,
            requests,
            offsets,
            batch.seeds[requests],
            positions,
            self._parameters(batch, "top_k")[requests],
        )
        temperature, top_p = (
            torch.from_numpy(self._parameters(batch, name)[requests])
            .float()
            .to(self.device)
            for name in ("temperature", "top_p")
        )
        drawn = []
        for tile in tiles:
            tokens, q = draw_drafts(
                self._logits(hidden[tile]),
                temperature[tile],
                top_k[tile],
                top_p[tile],
                seeds[tile],
                positions[tile],
                banned_ids=[mask_id],
            )
            probs[of_row[tile], offsets[tile]] = q
            drawn.append(tokens)
        return torch.cat(drawn)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V] of hidden states [n, H]; on all ranks the same."""
        logits: torch.Tensor = self.model.gathered(self.model.logits(hidden))
        return logits

    @staticmethod
    def _parameters(batch: Batch, name: str) -> np.ndarray:
        """[R]: a sampling parameter of each request."""
        return np.array([getattr(row, name) for row in batch.parameters])


def _refuse_parallelism(vllm_config: VllmConfig, draft: Any) -> None:
    """Refuse what the drafter's forwards cannot follow.

    Raises:
        ValueError: context or data parallelism.
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
