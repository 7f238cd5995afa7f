# SPDX-License-Identifier: Apache-2.0
"""DEER on vLLM's model runner V2, in place of vLLM's draft-model speculator.

The runner asks for K tokens of each request, in a tensor; what a request's draft lacks
of K (`drafts.limit_of`) is cut off where the scheduler hears of the drafts. A step of
drafts of K tokens has one length for all, as whole CUDA graphs of the target need.

Verification reads logits of the drafter, not yet divided by the temperature, from a
buffer with a row for each slot. The logarithms of what was drawn from stand there,
times the temperature: they give back that very distribution, top-k and top-p included.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from vllm_dlm.spec_decode.deer.rounds import DeerRounds
from vllm_dlm.spec_decode.drafts import (
    Drafts,
    FailSafe,
    clip,
    limit_of,
    make_certain,
    options_of,
    seed_of,
    share_of,
)
from vllm_dlm.spec_decode.options import request_limit

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner


@dataclass(frozen=True)
class Step:
    """What a round knows of R requests; see `rounds.Texts`."""

    request_ids: list[str]
    slots: np.ndarray
    """[R] int64: rows of the runner's tables."""
    num_tokens: np.ndarray
    limits: np.ndarray
    token_ids: np.ndarray
    computed: np.ndarray
    computed_before: np.ndarray
    parameters: list[SamplingParams]

    @cached_property
    def seeds(self) -> np.ndarray:
        """[R] int64."""
        pairs = zip(self.parameters, self.request_ids, strict=True)
        return np.array([seed_of(*pair) for pair in pairs], np.int64)

    @property
    def all_greedy(self) -> bool:
        """Whether no request draws."""
        return all(params.temperature == 0 for params in self.parameters)


class Parameters(LogitsProcessor):
    """Remembers the sampling parameters of each slot; it changes no logits.

    The runner's tables have no request's own draft limit and no structured outputs.
    """

    def __init__(self) -> None:
        self.of_slot: dict[int, SamplingParams] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Called by the runner for each new request."""
        self.of_slot[req_idx] = sampling_params
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Called in each step in which another processor has work."""
        return logits


class DraftsOfManyLengths(DraftTokensHandler):
    """Tells the scheduler of each request's draft no more than it has."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.lengths: dict[str, int] = {}
        """Of the drafts of the last step."""

    def get_draft_tokens(self) -> DraftTokenIds:
        """Called by the engine after each step."""
        drafts = super().get_draft_tokens()
        tokens = [
            row[: self.lengths.get(request, 0)]
            for request, row in zip(drafts.req_ids, drafts.draft_token_ids, strict=True)
        ]
        return DraftTokenIds(drafts.req_ids, tokens)


class DeerSpeculator(FailSafe, DeerRounds, DraftModelSpeculator):
    """What vLLM's runner asks of a speculator, answered by the network."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: GPUModelRunner
    ) -> None:
        DraftModelSpeculator.__init__(self, vllm_config, device)
        self.runner = runner
        self.options = options_of(vllm_config)
        self.counts: Counter[str] = Counter()
        self.parameters = Parameters()
        self.handler = DraftsOfManyLengths(device)
        self.slots = np.zeros(0, np.int64)
        """[R] of the step."""
        self.set_up(vllm_config)

    def draft_logits_spec(self, vllm_config: VllmConfig) -> tuple[torch.dtype, float]:
        """Type and first value of the buffer: what is rounded would bias texts."""
        return torch.float32, 0.0

    @property
    def computes_with_others(self) -> bool:
        """Whether other ranks wait for this one's part of a forward."""
        tensor_parallel: int = self.vllm_config.parallel_config.tensor_parallel_size
        return tensor_parallel > 1

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter; called by vLLM once the target is loaded."""
        self.load_network()
        self.draft_attn_layer_names = self.paged_layers

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        """Not called: `load_model` does it."""
        raise NotImplementedError

    def set_attn(
        self,
        model_state: Any,
        kv_cache_config: KVCacheConfig,
        block_tables: BlockTables,
        target_input_buffers: Any,
        target_attn_groups: Any,
    ) -> None:
        """Prepare attention over the drafter's pages; called when vLLM has sized them.

        Raises:
            ValueError: pages of a size that the drafter's blocks do not fit into.
        """
        group = self.use_pages(kv_cache_config, self.runner.kernel_block_sizes)
        self.attn_groups = [[group]] if self.context == "cached" else []
        self.block_tables = block_tables
        processors = self.runner.sampler.logits_processors
        if self.parameters not in processors:
            processors.append(self.parameters)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """The drafter runs without graphs: rows of a round differ too much."""

    def capture(self) -> None:
        """Nothing to capture."""

    def reserved(self) -> np.ndarray:
        """[R]: positions for which the requests of the step have pages."""
        size = self.block_tables.block_sizes[self.page_group]
        counts: np.ndarray = self.block_tables.num_blocks.np[self.page_group]
        return counts[self.slots].astype(np.int64) * size

    def page_table(self, requests: np.ndarray, width: int) -> np.ndarray:
        """[R, width] int32: the first pages of these rows of the batch."""
        table = self.block_tables.block_tables[self.page_group].gpu
        rows = torch.from_numpy(self.slots[requests]).to(table.device)
        pages: np.ndarray = table[rows, :width].cpu().numpy()
        return pages

    def nothing(self) -> list[list[int]]:
        """An empty draft for each request of the step."""
        return [[] for _ in self.slots]

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state: Any = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: Any = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Called by vLLM when a step's tokens are in its tables; [R, K] int64."""
        drafted = self.draft_tokens[: input_batch.num_reqs]
        if dummy_run:
            if is_profile:
                self.profile(input_batch.num_tokens)
            return drafted
        most = self.num_speculative_steps
        if num_speculative_tokens is not None:
            most = min(most, num_speculative_tokens)
        self.slots = input_batch.idx_mapping_np.astype(np.int64)
        tokens = self.draft_or_nothing(lambda: self._round(input_batch, most))
        self.handler.lengths = dict(
            zip(input_batch.req_ids, map(len, tokens), strict=True)
        )
        padded = np.zeros(drafted.shape, np.int64)
        for row, draft in enumerate(tokens):
            padded[row, : len(draft)] = draft
        drafted.copy_(torch.from_numpy(padded))
        return drafted

    def _round(self, input_batch: InputBatch, most: int) -> list[list[int]]:
        step = self._step(input_batch, most)
        drafts: Drafts = self.draft(step)
        tokens = clip(drafts.tokens, step.limits)
        if drafts.probs is not None:
            make_certain(drafts.probs, tokens, step.parameters)
            self._attach(step, tokens, drafts.probs)
        elif not step.all_greedy:
            self._attach_certain(step, tokens)
        return tokens

    def _step(self, input_batch: InputBatch, most: int) -> Step:
        """What the runner's tables say after a step, on the host."""
        states = self.runner.req_states
        slots = input_batch.idx_mapping
        num_tokens, computed, prompts = (
            torch.stack(
                [
                    states.total_len.gpu[slots],
                    states.num_computed_tokens.gpu[slots],
                    states.prompt_len.gpu[slots],
                ]
            )
            .cpu()
            .numpy()
            .astype(np.int64)
        )
        parameters = [self.parameters.of_slot[slot] for slot in self.slots.tolist()]
        longest = self.runner.max_model_len
        share = share_of(self.runner.max_num_tokens, len(slots), most)
        limits = np.zeros(len(slots), np.int64)
        for row, params in enumerate(parameters):
            # Not while a prompt is being computed, or a preempted text anew.
            if computed[row] >= input_batch.prefill_len_np[row]:
                own = request_limit(params.extra_args, self.num_speculative_steps)
                prompt, output = int(prompts[row]), int(num_tokens[row] - prompts[row])
                limits[row] = limit_of(params, prompt, output, longest, min(own, share))
        width = int(num_tokens.max()) + self.num_speculative_steps
        return Step(
            request_ids=input_batch.req_ids,
            slots=self.slots,
            num_tokens=num_tokens,
            limits=limits,
            token_ids=states.all_token_ids.gpu[slots, :width].cpu().numpy(),
            computed=computed,
            # What the host says is exact, but for vLLM's warm-up, which guesses.
            computed_before=np.minimum(input_batch.num_computed_tokens_np, computed),
            parameters=parameters,
        )

    def _attach(self, step: Step, tokens: list[list[int]], probs: torch.Tensor) -> None:
        """Put what drafts were drawn from, [R, k, V], where verification reads it."""
        assert self.draft_logits is not None
        for row, draft in enumerate(tokens):
            temperature = step.parameters[row].temperature
            if draft and temperature > 0:
                logits = probs[row, : len(draft)].log() * temperature
                self.draft_logits[step.slots[row], : len(draft)] = logits

    def _attach_certain(self, step: Step, tokens: list[list[int]]) -> None:
        """The same for drafts without a distribution."""
        shape = (len(tokens), max(map(len, tokens), default=0), self.vocab_size)
        probs = torch.zeros(shape, device=self.device)
        for row, draft in enumerate(tokens):
            for place, token in enumerate(draft):
                probs[row, place, token] = 1
        self._attach(step, tokens, probs)
