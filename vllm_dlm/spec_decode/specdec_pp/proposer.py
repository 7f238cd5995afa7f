# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ in vLLM: an autoregressive draft model whose drafts end by a head's word.

The draft model is one of vLLM's own, with its keys in pages as the target's. A round's
first pass reads all tokens of the target's step, and the token just sampled; then each
pass reads one drafted token per row. Rows that have stopped leave the batch, so a short
draft costs few passes, not only a short verification.
Source: arXiv 2405.19715; the rule is in `head.py`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.spec_decode.drafter import Batch, Drafter, Drafts
from vllm_dlm.spec_decode.options import SpecDecPlusPlus
from vllm_dlm.spec_decode.sampling import draw_drafts
from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead, StopRule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class SpecDecPlusPlusProposer(Drafter):
    """Drafts token by token until a rejection has become probable.

    `counts`: "rounds"; "forwards" of the draft model and the token "rows" in them;
    "drafted" tokens.

    Raises:
        ValueError: no head, or one that does not fit the draft model; a draft model
            with a shorter context than the target; a mixture of experts over data
            parallel ranks, which would have to draft equally long.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        super().__init__(vllm_config, device, runner)
        options = cast(SpecDecPlusPlus, self.options)
        self.rule = StopRule(
            options.stop_threshold, options.min_tokens, options.num_speculative_tokens
        )
        draft = self.draft_model_config
        self.head = AcceptanceHead.load(
            options.head or draft.model, draft.get_hidden_size()
        ).to(device)
        if draft.max_model_len < self.max_model_len:
            raise ValueError(
                f"the draft model {draft.model} takes {draft.max_model_len} tokens, "
                f"the target is served with {self.max_model_len}: set max_model_len "
                f"to {draft.max_model_len} or less, or take another draft model"
            )
        if vllm_config.parallel_config.data_parallel_size > 1:
            raise ValueError(
                "specdec++ does not go with data parallel mixtures of experts: their "
                "ranks compute together, and each would draft another length"
            )
        about = "; ".join(f"{name}: {text}" for name, text in self.head.about.items())
        logger.info("SpecDec++: acceptance head of %s", about or "unknown training")

    def draft(self, batch: Batch) -> Drafts:
        """Draft one round: a pass of all rows, then passes of the rows that go on."""
        self.counts["rounds"] += 1
        hidden, positions, attention = self._first_pass(batch)
        tokens: list[list[int]] = [[] for _ in batch.limits]
        if not batch.limits.any():
            return Drafts(tokens)
        ends = [stop_ids(parameters) for parameters in batch.parameters]
        draws = _Draws(batch, self.device)
        limits = torch.from_numpy(batch.limits).to(self.device)
        rows = np.flatnonzero(batch.limits)
        kept = limits > 0
        hidden, positions, limits = hidden[kept], positions[kept], limits[kept]
        attention = self._narrowed(attention, kept, batch.num_tokens[rows])
        # The first input is no draft: verified already.
        accepted = torch.ones(len(rows), device=self.device)
        for drafted in itertools.count(1):
            drawn = draws(self.model.compute_logits(hidden), rows)
            going = self.rule.goes_on(accepted, drafted, limits).cpu().numpy()
            for at, (row, token) in enumerate(zip(rows, drawn.tolist(), strict=True)):
                tokens[row].append(token)
                going[at] &= token not in ends[row]
            if not going.any():
                break
            if not going.all():
                rows, kept = rows[going], torch.from_numpy(going).to(self.device)
                drawn, positions = drawn[kept], positions[kept]
                accepted, limits = accepted[kept], limits[kept]
                lengths = batch.num_tokens[rows] + drafted - 1
                attention = self._narrowed(attention, kept, lengths)
            hidden, positions = self._step(drawn, positions, attention)
            accepted = accepted * self.head.accept_probability(hidden)
        self.counts["drafted"] += sum(map(len, tokens))
        return Drafts(tokens, draws.probs())

    def _first_pass(
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, CommonAttentionMetadata]:
        """Reads the step's tokens and the next one of each row.

        Returns:
            Hidden states [R, H] and positions [R] at the next tokens; the metadata.
        """
        num_tokens, last, attention = self.set_inputs_first_pass(
            target_token_ids=batch.target_token_ids,
            next_token_ids=batch.next_token_ids,
            target_positions=batch.target_positions,
            target_hidden_states=batch.target_hidden_states,
            token_indices_to_sample=None,
            cad=batch.attention,
            num_rejected_tokens_gpu=None,
        )
        hidden = self._forward(num_tokens, attention)
        return hidden[last], self.positions[last], attention

    def _step(
        self,
        drawn: torch.Tensor,
        positions: torch.Tensor,
        attention: CommonAttentionMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads one drafted token per row, `attention` updated in place.

        Returns:
            Hidden states [N, H] at these tokens, and their positions [N].
        """
        count = len(drawn)
        positions = self._update_positions_dependent_metadata(
            positions, attention, count, count, self.block_size
        )
        self.input_ids[:count] = drawn
        return self._forward(count, attention, draft_index=1), positions

    def _forward(
        self, num_tokens: int, attention: CommonAttentionMetadata, draft_index: int = 0
    ) -> torch.Tensor:
        """The draft model over the first `num_tokens` inputs; hidden states [., H]."""
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            attention, draft_index
        )
        mode, padded, across = self._determine_batch_execution_and_padding(num_tokens)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=padded,
            num_tokens_across_dp=across,
            cudagraph_runtime_mode=mode,
            slot_mapping=self._get_slot_mapping(padded, attention.slot_mapping),
        ):
            hidden = self.model(
                input_ids=self.input_ids[:padded],
                positions=self._get_positions(padded),
                inputs_embeds=None,
            )
        self.counts["forwards"] += 1
        self.counts["rows"] += num_tokens
        return hidden[:num_tokens]

    def _narrowed(
        self,
        attention: CommonAttentionMetadata,
        kept: torch.Tensor,
        lengths: np.ndarray,
    ) -> CommonAttentionMetadata:
        """Metadata of one token in each of some rows.

        Args:
            attention: of all rows.
            kept: [rows] bool.
            lengths: [N] int64, of the kept rows: tokens with keys.
        """
        count = len(lengths)
        return CommonAttentionMetadata(
            query_start_loc=self.arange[: count + 1],
            query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32),
            seq_lens=attention.seq_lens[kept],
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths.astype(np.int32)),
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=int(lengths.max()),
            block_table_tensor=attention.block_table_tensor[kept],
            slot_mapping=self._slot_mapping_buffer[:count],
        )


class _Draws:
    """A round's draws, and what they were drawn from."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        sampling = batch.sampling
        self._greedy = sampling.all_greedy
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self._greedy:
            return
        self._seeds = torch.from_numpy(batch.seeds).to(device)
        self._positions = torch.from_numpy(batch.num_tokens).to(device)
        ones = torch.ones_like(self._seeds)
        self._temperature = sampling.temperature
        self._top_k = 0 * ones if sampling.top_k is None else sampling.top_k
        self._top_p = ones.float() if sampling.top_p is None else sampling.top_p

    def __call__(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """The next token [N] of each of the rows [N], from logits [N, V]."""
        if self._greedy:
            return logits.argmax(dim=-1)
        index = torch.from_numpy(rows).to(logits.device)
        tokens, probs = draw_drafts(
            logits,
            self._temperature[index],
            self._top_k[index],
            self._top_p[index],
            self._seeds[index],
            self._positions[index] + len(self._steps),
        )
        self._steps.append((index, probs))
        return tokens

    def probs(self) -> torch.Tensor | None:
        """[R, longest draft, V] float32; None if all rows are greedy."""
        if self._greedy:
            return None
        _, first = self._steps[0]
        shape = len(self._seeds), len(self._steps), first.shape[1]
        probs = first.new_zeros(shape)
        for step, (index, drawn_from) in enumerate(self._steps):
            probs[index, step] = drawn_from
        return probs
