# SPDX-License-Identifier: Apache-2.0
"""DlmModelState: every request's canvas, by slot, on the device.

vLLM's V2 runner asks this object what a step feeds the network (`prepare_inputs`),
what it attends to (`prepare_attn`) and who reads the logits (`custom_sampler`). All
per-request facts are tensors addressed by slot; the host keeps only what it needs to
group requests (strategy, sampling parameters).

A request that was preempted comes back as a new one with its finished tokens; its
active block is masked again and replayed (see `scheduler.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_dlm.config.cache import Reach
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.request import RequestConfig, resolve, server_config
from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.config.tccf import Stages, one_at_a_time
from vllm_dlm.model_executor.clean_pages import note_device
from vllm_dlm.model_executor.host_slots import HostSlots
from vllm_dlm.model_executor.layout import Limits, RequestLayout, lay_out
from vllm_dlm.model_executor.model_key import model_key
from vllm_dlm.model_executor.planning.branches import Drafts, page_size_of
from vllm_dlm.model_executor.planning.step_plan import SegmentPlan, plan_forward
from vllm_dlm.model_executor.sampling.eotp import MODES
from vllm_dlm.model_executor.sampling.logits import tile_rows
from vllm_dlm.strategies import STRATEGIES, Strategy
from vllm_dlm.strategies.base import Context

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


class DlmModelState(ModelState):
    """State of the running requests: tokens, masks, active block, step counters."""

    # A diffusion forward writes as many tokens as its strategy says; none is implied.
    num_new_sampled_tokens_per_step = 0

    def __init__(
        self,
        vllm_config: Any,
        model: torch.nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        note_device(device.type)
        self.server = server_config(vllm_config)
        hf_config = self.model_config.hf_config
        self.defaults = ModelDefaults.from_hf_config(hf_config)
        self.max_canvas: int = hf_config.canvas_length
        self.default_config = resolve(self.server, None, self.defaults).sized(
            self.max_canvas, self.max_canvas
        )
        """How a request without options of its own is decoded."""
        self.mask_id = self.defaults.mask_token_id
        self.tile_rows = tile_rows(hf_config.vocab_size, self.dtype, device)
        """Rows that go through lm_head at a time."""
        self._model_key = model_key(
            self.model_config.model, self.model_config.revision, hf_config
        )
        self.commits_alone = (
            self.server.commit == "separate" and not self.defaults.seeds_blocks
        )
        """A forward that ends before the active block only writes KV."""
        self.plan: SegmentPlan | None = None
        """The forward in flight; None while vLLM profiles with dummy batches."""

        slots, length = self.max_num_reqs, self.model_config.max_model_len

        def per_slot(dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(slots, dtype=dtype, device=device)

        # int32 as vLLM's own token buffers; 4 bytes x slots x max_model_len.
        self.tokens = torch.zeros(slots, length, dtype=torch.int32, device=device)
        # A bitmap, not a comparison with the mask id: a literal mask token in a
        # prompt is ordinary text.
        self.masked = torch.zeros(slots, length, dtype=torch.bool, device=device)
        self.prompt_len = per_slot()
        self.canvas_end = per_slot()
        self.text_end = per_slot()
        """End of the block in which the longest text ends."""
        self.block_start = per_slot()
        self.block_length = per_slot()
        self.sub_block_length = per_slot()
        self.emitted = per_slot()
        """Output tokens handed to the scheduler so far."""
        self.step = per_slot()
        """Denoise steps spent on the active block."""
        self.block_masks = per_slot()
        """Masks the active block began with: what the step schedule divides."""
        self.steps_per_block = per_slot()
        self.reach = torch.zeros(
            slots, len(Reach._fields), dtype=torch.int64, device=device
        )
        """[slots, fields of `cache.Reach`]: cache policies of class A."""
        self.frontier = per_slot()
        """First position that was not final before the active block's last step."""
        self.eotp = per_slot()
        """Index into `eotp.MODES`."""
        self.eotp_threshold = per_slot(torch.float32)
        self.exact = per_slot(torch.bool)
        """`reference_exact`: the mask id may be predicted, as in the references."""
        self.opens_alone = per_slot(torch.bool)
        """A block's first step writes its first token alone (`opening.py`)."""

        self.host = HostSlots(slots, length)
        self.requests: dict[int, DlmRequest] = {}
        self._slot_of: dict[str, int] = {}
        self.on_remove: Callable[[int], None] | None = None
        """Called with a request's slot before it is forgotten."""

    # -- requests ----------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Give a request's slot its prompt, finished tokens and an all-mask canvas."""
        self.host.settle()
        params = new_req_data.sampling_params
        config = resolve(self.server, params.extra_args, self.defaults)
        config = config.sized(params.max_tokens, self.max_canvas)
        known = new_req_data.prefill_token_ids
        prompt_len = new_req_data.prompt_len
        stages = Stages.of(config.tccf, self.model_config)
        if stages is not None and stages.is_over(known[prompt_len:]):
            config = one_at_a_time(config)
        layout = lay_out(
            config,
            self.defaults,
            Limits(self.max_canvas, self.max_model_len),
            prompt_len=prompt_len,
            num_known=len(known),
            max_tokens=params.max_tokens,
        )
        slot, block, first_mask = req_index, layout.block_length, layout.first_mask

        self.tokens[slot].fill_(self.mask_id)
        self.tokens[slot, :first_mask] = torch.tensor(
            known[:first_mask], dtype=torch.int32
        )
        self.masked[slot].fill_(False)
        self.masked[slot, first_mask:] = True
        if "branches" in STRATEGIES[config.strategy].needs:
            self.drafts.forget(slot)
        self.prompt_len[slot] = prompt_len
        self.canvas_end[slot] = self.text_end[slot] = layout.text_end
        self.block_start[slot] = self.frontier[slot] = layout.first_block
        self.block_length[slot] = block
        self.sub_block_length[slot] = layout.sub_block_length
        self.emitted[slot] = layout.num_emitted
        self.step[slot] = layout.first_step
        self.steps_per_block[slot] = layout.steps_per_block
        self.reach[slot] = torch.tensor(layout.reach)
        self.eotp[slot] = MODES.index(config.eotp)
        self.eotp_threshold[slot] = config.eotp_threshold
        self.exact[slot] = config.reference_exact
        self.opens_alone[slot] = layout.opens_alone

        host = self.host
        host.prompt_len[slot] = prompt_len
        host.block_length[slot] = block
        host.sub_block_length[slot] = layout.sub_block_length
        host.origin[slot] = layout.origin
        host.first_block[slot] = host.block_start[slot] = layout.first_block
        host.seeds[slot] = layout.leads_first
        host.text_end[slot] = layout.text_end
        # With full attention the first forward says where the canvas ends.
        host.canvas_end[slot] = 0 if layout.is_full else layout.text_end
        host.keys_behind[slot] = layout.reach.keys
        host.opens_alone[slot] = layout.opens_alone
        host.predicts_end[slot] = config.eotp != "off"
        host.masked[slot, :block] = np.arange(block) >= first_mask - layout.first_block

        self._slot_of[new_req_data.req_id] = slot
        self.requests[slot] = DlmRequest(
            new_req_data.req_id,
            config,
            layout,
            params,
            self.model_config.seed,
            measures_drawn=STRATEGIES[config.strategy].measures == "drawn"
            or (
                config.reference_exact and self.defaults.reference_confidence == "drawn"
            ),
        )

    def remove_request(self, req_id: str) -> None:
        """Forget a finished or preempted request."""
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            if self.on_remove is not None:
                self.on_remove(slot)
            del self.requests[slot]

    # -- one step ----------------------------------------------------------

    def preprocess_state(
        self,
        input_batch: Any,
        block_tables: tuple[torch.Tensor, ...],
        kv_cache_config: Any,
        num_computed_tokens: torch.Tensor,
    ) -> None:
        """Plan the forward. vLLM calls this for real batches only, before the rest."""
        self.plan = plan_forward(self, input_batch, page_size_of(kv_cache_config))

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Attention over the plan's segments (or a dummy batch's rows)."""
        num_rows, plan, own_tables = input_batch.num_reqs, self.plan, block_tables
        causal: bool | torch.Tensor = False
        if plan is None:
            query_start_loc = input_batch.query_start_loc[: num_rows + 1]
            query_start_loc_cpu = torch.from_numpy(
                input_batch.query_start_loc_np[: num_rows + 1]
            )
            max_query_len = int(input_batch.num_scheduled_tokens.max())
            kv_lens = input_batch.seq_lens[:num_rows]
        else:
            segments = plan.segments
            num_rows = len(segments.request)
            query_start_loc_cpu = torch.from_numpy(segments.query_start_loc)
            query_start_loc = query_start_loc_cpu.to(self.device, non_blocking=True)
            max_query_len = int(np.diff(segments.query_start_loc).max())
            kv_lens = plan.kv_lens
            if num_rows != input_batch.num_reqs:
                request = torch.from_numpy(segments.request).to(
                    self.device, non_blocking=True
                )
                block_tables = tuple(table[request] for table in block_tables)
            if plan.causal is not None:
                causal = plan.causal
            if plan.branches is not None:
                # A request with branches has one kind of pages (`scheduler.py`).
                page_size = page_size_of(kv_cache_config)
                plan.branches.place_keys(slot_mappings[0], own_tables[0], page_size)
                plan.branches.swap_pages(block_tables[0])
        metadata: dict[str, Any] = build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=num_rows,
            num_tokens=input_batch.num_tokens,
            query_start_loc_gpu=query_start_loc,
            query_start_loc_cpu=query_start_loc_cpu,
            max_query_len=max_query_len,
            seq_lens=kv_lens,
            max_seq_len=self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            causal=causal,
            for_cudagraph_capture=for_capture,
            ubatch_idx=ubatch_idx,
        )
        return metadata

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Write the batch's token ids and name the rows that need logits."""
        if self.plan is None:
            return {}
        num_tokens = input_batch.num_tokens
        row_slots = torch.from_numpy(
            np.repeat(input_batch.idx_mapping_np, input_batch.num_scheduled_tokens)
        ).to(self.device, non_blocking=True)
        positions, branches = input_batch.positions[:num_tokens], self.plan.branches
        # In place: CUDA graphs replay from vLLM's own buffers.
        if branches is not None:
            positions -= branches.setback
        tokens = self.tokens[row_slots, positions]
        logits_rows = self.plan.logits_rows
        if branches is not None:
            row_branch = branches.row_branch
            tokens = self.drafts.written(tokens, row_slots, positions, row_branch)
            logits_rows = torch.cat([logits_rows, branches.blocks.logits_rows])
        input_batch.input_ids[:num_tokens] = tokens
        input_batch.logits_indices = logits_rows
        return {}

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: Any, input_batch: Any, req_states: Any
    ) -> None:
        """Text only: no embeddings to prepare."""

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Nothing beyond vLLM's own dummy token ids."""
        return {}

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str]:
        """No full CUDA graphs: a plan's key lengths are new tensors in each step.

        Piecewise graphs, which leave attention out, are fine.
        """
        return AttentionCGSupport.NEVER, "SegmentPlan"

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        """Ours replaces vLLM's; there is no rejection sampling."""
        from vllm_dlm.model_executor.sampling.sampler import DenoisingSampler

        return DenoisingSampler(self, sampler.req_states), None

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """Nothing: the sampler has advanced the state already."""

    def context(self, cache: str) -> Context:
        """Engine facts for the strategies of requests under one KV policy."""
        return Context(
            device=self.device,
            model=self.model_config.model,
            model_key=self._model_key,
            model_class=self.defaults.model_class,
            cache=cache,
            options=self.server.strategy_options(),
            agreed=get_tp_group().broadcast_object,
        )

    @cached_property
    def drafts(self) -> Drafts:
        """Of requests that draft; 8 bytes x slots x max_model_len once there is one."""
        return Drafts(self.masked.shape, self.mask_id, self.device)

    def take_plan(self) -> SegmentPlan | None:
        """The plan of the forward just run; None after a dummy batch."""
        plan, self.plan = self.plan, None
        return plan


class DlmRequest:
    """Host-side facts of one request, fixed while it lives."""

    def __init__(
        self,
        req_id: str,
        config: RequestConfig,
        layout: RequestLayout,
        params: SamplingParams,
        seed: int,
        *,
        measures_drawn: bool,
    ) -> None:
        self.id = req_id
        self.config = config
        self.layout = layout
        self.strategy: Strategy
        """The object that decides the request: `StrategyGroups.add` chooses it."""
        self.params = params
        self.measures_drawn = measures_drawn
        """Whether statistics are those of the distribution that is drawn from."""
        # Unseeded requests still need one seed that all tensor-parallel ranks share.
        digest = hashlib.blake2b(f"{seed}:{req_id}".encode(), digest_size=8).digest()
        self.seed = (
            params.seed
            if params.seed is not None
            else int.from_bytes(digest, "little") >> 1
        )
        self.stop_ids = sorted(stop_ids(params))
        """Token ids at which the scheduler ends this request."""
