# SPDX-License-Identifier: Apache-2.0
"""The part of our drafters that faces vLLM: who may draft how many tokens.

vLLM (model runner V1) asks a drafter once a step, after the step's tokens are known on
the host. `Drafter.propose` turns its arguments into a `Batch`, lets the method draft,
and hands over at most what each request may take. A drafter that fails is switched
off with a warning: requests go on without drafts, and their texts stay right. Only
if the drafter computes together with other ranks, the engine ends, because these would
wait for it for ever.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.spec_decode.draft_model import DraftModelProposer

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
from vllm_dlm.spec_decode.options import Options, request_limit
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@dataclass(frozen=True)
class Batch:
    """What a round of drafting knows: R requests, T tokens of the step they finished.

    Tokens that verification rejected are not among the T.
    """

    request_ids: list[str]
    num_tokens: np.ndarray
    """[R] int64: prompt and output, the token just sampled included."""
    limits: np.ndarray
    """[R] int64: most tokens that a draft may have; 0 for no draft."""
    token_ids: np.ndarray
    """[R, max_model_len] int32; row i holds `num_tokens[i]` tokens."""
    next_token_ids: torch.Tensor
    """[R] int32: the token just sampled, behind a chunk of a prompt the next of it."""
    target_token_ids: torch.Tensor
    """[T] int32."""
    target_positions: torch.Tensor
    """[T] int64."""
    target_hidden_states: torch.Tensor
    """[T, H]; auxiliary hidden states, side by side, where the model gives those."""
    attention: CommonAttentionMetadata
    """Attention metadata of the T tokens."""
    sampling: SamplingMetadata
    requests: list[CachedRequestState]
    """[R], as vLLM's runner keeps them."""

    @cached_property
    def parameters(self) -> list[SamplingParams]:
        """[R], each request's own."""
        return [request.sampling_params for request in self.requests]

    @cached_property
    def seeds(self) -> np.ndarray:
        """[R] int64: the request's seed, where it has none a hash of its id.

        For those who draw: greedy rounds need none.
        """
        return np.array(
            [
                seed_of(request.sampling_params, request.req_id)
                for request in self.requests
            ],
            np.int64,
        )

    @property
    def computed(self) -> np.ndarray:
        """[R] int64: tokens whose keys the target has, the step's included."""
        found: np.ndarray = self.attention.seq_lens_cpu_upper_bound.numpy()
        return found.astype(np.int64)

    @property
    def computed_before(self) -> np.ndarray:
        """[R] int64: those of them that it had before the step."""
        starts: np.ndarray = self.attention.query_start_loc_cpu.numpy()
        return self.computed - np.diff(starts)

    @property
    def all_greedy(self) -> bool:
        """Whether no request draws."""
        greedy: bool = self.sampling.all_greedy
        return greedy


class Drafter(FailSafe, DraftModelProposer):
    """Base of the drafters that vLLM takes for its draft model."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: GPUModelRunner
    ) -> None:
        super().__init__(vllm_config, device, runner)
        # Where the runner looks for what drafts were drawn from.
        replace(self, "_last_draft_probs", None)
        self.runner = runner
        self.options: Options = options_of(vllm_config)
        self.counts: Counter[str] = Counter()
        """What drafting has cost: "forwards" and "rows" of the drafter, ..."""

    @property
    def computes_with_others(self) -> bool:
        tensor_parallel: int = self.vllm_config.parallel_config.tensor_parallel_size
        return tensor_parallel > 1

    def draft(self, batch: Batch) -> Drafts:
        """Draft for every row whose limit is not 0; a method's whole difference."""
        raise NotImplementedError

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called by vLLM; R lists of tokens."""
        self._last_draft_probs = None

        def draft() -> list[list[int]]:
            known = self.runner.input_batch
            rows = known.req_ids
            batch = Batch(
                request_ids=list(rows),
                num_tokens=known.num_tokens_no_spec[: len(rows)].astype(np.int64),
                limits=limits(self.runner, num_speculative_tokens),
                token_ids=known.token_ids_cpu[: len(rows)],
                next_token_ids=next_token_ids,
                target_token_ids=target_token_ids,
                target_positions=target_positions,
                target_hidden_states=target_hidden_states,
                attention=common_attn_metadata,
                sampling=sampling_metadata,
                requests=[self.runner.requests[row] for row in rows],
            )
            drafts = self.draft(batch)
            tokens = clip(drafts.tokens, batch.limits)
            if drafts.probs is not None:
                make_certain(drafts.probs, tokens, batch.parameters)
            self._last_draft_probs = drafts.probs
            return tokens

        return self.draft_or_nothing(draft)


def limits(runner: GPUModelRunner, most: int) -> np.ndarray:
    """[R] int64: most tokens that each request's draft may have.

    Nothing while a prompt is being computed, or a preempted text anew; else an equal
    share of a step's token budget, and what `limit_of` says.
    """
    batch = runner.input_batch
    budget = runner.scheduler_config.max_num_batched_tokens
    most = share_of(budget, len(batch.req_ids), most)
    going_on = runner.discard_request_mask.np
    found = np.zeros(len(batch.req_ids), np.int64)
    for row, request_id in enumerate(batch.req_ids):
        request = runner.requests[request_id]
        params = request.sampling_params
        if params is not None and not going_on[row]:
            found[row] = limit_of(
                params,
                request.num_prompt_tokens,
                len(request.output_token_ids),
                runner.max_model_len,
                min(request_limit(params.extra_args, runner.num_spec_tokens), most),
            )
    return found
