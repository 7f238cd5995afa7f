# SPDX-License-Identifier: Apache-2.0
"""DlmModelState: what vLLM's runner asks of a diffusion model in each step.

vLLM's V2 runner tells this object which requests come and go, and asks what a step
feeds the network (`prepare_inputs`), what it attends to (`prepare_attn`) and who reads
the logits (`custom_sampler`). The answers are the engine's parts': the request table
(`slots.py`), the plan of each forward (`planning/`) and the sampler (`sampling/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_dlm.model_executor.clean_pages import note_device
from vllm_dlm.model_executor.cpu_quantised import check_quantised
from vllm_dlm.model_executor.facts import EngineFacts, RequestFacts
from vllm_dlm.model_executor.layout import GRAPH_SEGMENTS, usual_rows
from vllm_dlm.model_executor.lora.targets import refuse_unplaced
from vllm_dlm.model_executor.planning.attention import (
    WITH_EMPTY_ROWS,
    AttentionBuffers,
)
from vllm_dlm.model_executor.planning.branch_pages import page_size_of
from vllm_dlm.model_executor.planning.step_plan import SegmentPlan, plan_forward
from vllm_dlm.model_executor.sampling.sampler import DenoisingSampler
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.model_executor.soft_inputs import InputEmbeddings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup


class DlmModelState(ModelState):
    """vLLM's interface to the engine's parts; see the module docstring."""

    # A diffusion forward writes as many tokens as its strategy says; none is implied.
    num_new_sampled_tokens_per_step = 0

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        note_device(device.type)
        check_quantised(model, vllm_config.model_config.dtype)
        if vllm_config.lora_config is not None:
            refuse_unplaced(cast("Any", model).lora_manager)
        self.facts = EngineFacts.of(vllm_config, device)
        self.slots = RequestSlots(
            self.facts.max_num_reqs,
            self.facts.max_model_len,
            self.facts.mask_id,
            device,
            self.facts.vocab_size if self.facts.defaults.noise == "uniform" else 0,
        )
        self._attention = AttentionBuffers(
            self.facts.max_num_reqs,
            device,
            has_causal_rows=self.facts.defaults.attention == "causal",
        )
        self._marks_canvas = getattr(model, "mark_canvas_rows", None)
        """Of models that compute rows of a canvas otherwise than rows of text."""
        self._embeddings: InputEmbeddings | None = None
        if self.facts.soft_inputs:
            self._embeddings = InputEmbeddings(model, self.slots, self.facts)
        self._sampler: DenoisingSampler | None = None
        self._plan: SegmentPlan | None = None
        """The forward in flight; None while vLLM profiles with dummy batches."""

    def custom_sampler(self, sampler: Sampler) -> tuple[DenoisingSampler, None]:
        """Ours replaces vLLM's; there is no rejection sampling."""
        self._sampler = DenoisingSampler(
            self.slots, self.facts, self.model, sampler.req_states, self._take_plan
        )
        return self._sampler, None

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        """Learn how many pages a request may have; before graphs are captured."""
        self._attention.allocate_tables(block_tables.input_block_tables)

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str]:
        """Which steps may be whole CUDA graphs; and what forbids them, where none may.

        vLLM replays a graph for a batch whose requests have as many rows each as the
        config hook has told it, which are those of a step in the middle of a block.
        Piecewise graphs, which leave attention out, take every batch.
        """
        usual = self.facts.default_config
        width = usual_rows(
            usual, self.facts.defaults, blocks=self.facts.server.async_blocks
        )
        if width is None or width < GRAPH_SEGMENTS:
            reason = f"cache {usual.cache!r} and blocks of {usual.block_length}"
            return AttentionCGSupport.NEVER, f"SegmentPlan, with {reason}"
        if width != self.vllm_config.num_speculative_tokens:
            return AttentionCGSupport.NEVER, "SegmentPlan, without graphs"
        layers = get_layers_from_vllm_config(
            self.vllm_config, cast("type[Any]", AttentionLayerBase)
        )
        backends = {layer.get_attn_backend().get_name() for layer in layers.values()}
        unknown = sorted(backends - WITH_EMPTY_ROWS)
        if unknown:
            return AttentionCGSupport.NEVER, f"SegmentPlan, with {', '.join(unknown)}"
        return AttentionCGSupport.UNIFORM_BATCH, "SegmentPlan"

    # -- requests ----------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Admit a request; the runner then calls `DenoisingSampler.add_request`.

        And once all new requests of a step are admitted,
        `DenoisingSampler.apply_staged_writes`, which brings them to the device.
        """
        request = RequestFacts.of(new_req_data, self.facts)
        known = new_req_data.prefill_token_ids
        self.slots.admit(req_index, request, known)
        if request.pattern is not None:
            assert self._sampler is not None
            self._sampler.constrained.add(req_index, known)

    def remove_request(self, req_id: str) -> None:
        """Forget a finished or preempted request."""
        slot = self.slots.slot_of(req_id)
        if slot is not None:
            if self._sampler is not None:
                self._sampler.remove_request(slot)
            self.slots.release(slot)

    # -- one step ----------------------------------------------------------

    def preprocess_state(
        self,
        input_batch: InputBatch,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: KVCacheConfig,
        num_computed_tokens: torch.Tensor,
    ) -> None:
        """Plan the forward. vLLM calls this for real batches only, before the rest."""
        page_size = page_size_of(kv_cache_config)
        assert self._sampler is not None
        self._plan = plan_forward(
            self.slots, self.facts, input_batch, page_size, self._sampler.settle
        )

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention over the plan's segments (or a dummy batch's rows).

        A whole CUDA graph reads the tensors that it was captured with, and no other
        part of what is returned for a replay: all of them are written in place.
        """
        plan = self._plan
        is_whole = for_capture or cudagraph_mode == CUDAGraphMode.FULL
        rows = self._attention.fill(plan, input_batch, block_tables, is_whole=is_whole)
        if plan is not None and plan.branches is not None:
            page_size = page_size_of(kv_cache_config)
            plan.branches.place_keys(slot_mappings[0], block_tables[0], page_size)
        num_tokens = input_batch.num_tokens
        if is_whole:
            num_tokens = input_batch.num_tokens_after_padding
        metadata: dict[str, Any] = build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=rows.num_rows,
            num_tokens=num_tokens,
            query_start_loc_gpu=rows.query_start_loc,
            query_start_loc_cpu=rows.query_start_loc_cpu,
            max_query_len=rows.max_query_len,
            seq_lens=rows.seq_lens,
            max_seq_len=self.facts.max_model_len,
            block_tables=rows.block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            model_specific_attn_metadata=rows.extras,
            causal=rows.causal,
            for_cudagraph_capture=for_capture,
            ubatch_idx=ubatch_idx,
        )
        return metadata

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Any]:
        """Write the batch's token ids and name the rows that need logits."""
        if self._plan is None:
            return self._dummy_inputs(input_batch.num_tokens_after_padding)
        num_tokens, plan = input_batch.num_tokens, self._plan
        positions, branches = input_batch.positions[:num_tokens], plan.branches
        # In place: CUDA graphs replay from vLLM's own buffers.
        if branches is not None:
            positions -= branches.setback
        tokens = self.slots.tokens[plan.row_slots, positions]
        drafted = plan.row_drafts
        if branches is not None:
            row_branch = branches.row_branch
            drafted = row_branch if drafted is None else row_branch + drafted
        if drafted is not None:
            tokens = self.slots.drafts.written(
                tokens, plan.row_slots, positions, drafted
            )
        input_batch.input_ids[:num_tokens] = tokens
        if self._marks_canvas is not None:
            is_canvas = positions >= self.slots.block_start[plan.row_slots]
            self._marks_canvas(is_canvas)
        input_batch.logits_indices = plan.logits_rows
        if self._embeddings is None:
            return {}
        assert self._sampler is not None
        embeddings = self._embeddings.of(
            plan,
            input_batch.input_ids[:num_tokens],
            positions,
            self._sampler.groups.of,
            input_batch.num_tokens_after_padding,
        )
        return {"inputs_embeds": embeddings}

    def _dummy_inputs(self, num_tokens: int) -> dict[str, Any]:
        """What a forward of which nothing is read is fed beside token ids."""
        if self._embeddings is None:
            return {}
        return {"inputs_embeds": self._embeddings.of_dummy(num_tokens)}

    def _take_plan(self) -> SegmentPlan | None:
        """The plan of the forward just run; None after a dummy batch."""
        plan, self._plan = self._plan, None
        return plan

    # -- what diffusion models do not need ---------------------------------

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> None:
        """Text only: no embeddings to prepare."""

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """vLLM's own dummy token ids, and embeddings where the engine makes them."""
        return self._dummy_inputs(num_tokens)

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """Nothing: the sampler has advanced the requests already."""
