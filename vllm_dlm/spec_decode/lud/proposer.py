# SPDX-License-Identifier: Apache-2.0
"""LUD in vLLM: the target drafts for itself behind pad tokens, on its own KV cache.

A round has two forwards of the target. The first reads the newest token and K - 1 pads
behind it; its K rows are a draft of K tokens, of which the first is the target's own
next token. The second is vLLM's verification. What the pads write goes to the request's
lookahead slots, which verification writes anew. Drafts are verified as point masses:
exact at any temperature, whatever ends a draft.

LUD (lexical unit decoding, arXiv 2405.15208) takes the tokens that it is sure of
unverified, in one forward. No code is public: this is a reconstruction, as a drafter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.messages import quote
from vllm_dlm.spec_decode.drafter import Batch, Drafter, Drafts
from vllm_dlm.spec_decode.options import Lud

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

logger = init_logger(__name__)

LOGITS_ROWS = 256
"""Rows of logits held at a time."""


class LudProposer(Drafter):
    """Drafts with the target itself. `counts`: "forwards" that draft, "rows" in them,
    "drafted" tokens."""

    options: Lud

    def load_model(self, target_model: Any) -> None:
        """Take the target for its own drafter.

        Raises:
            ValueError: a target that cannot draft for itself, or no pad token.
        """
        if self.vllm_config.lora_config is not None:
            raise ValueError("speculative method 'lud' does not support LoRA adapters")
        if self.vllm_config.parallel_config.data_parallel_size > 1:
            raise ValueError(
                "speculative method 'lud' does not go with data parallel ranks, which "
                "compute together: one may draft while another has nothing to do"
            )
        config = self.vllm_config.model_config.hf_text_config
        self.pad_token_id = pad_token(self.options, config)
        layers: dict[str, Any] = get_layers_from_vllm_config(
            self.vllm_config,
            AttentionLayerBase,  # type: ignore[type-abstract]
        )
        windows = {getattr(layer, "sliding_window", None) for layer in layers.values()}
        is_plain = all(isinstance(layer, Attention) for layer in layers.values())
        if not is_plain or len(windows) > 1:
            raise ValueError(
                "speculative method 'lud' needs attention of one kind in all layers, "
                f"which {type(target_model).__name__} does not have"
            )
        self.model = target_model
        self._draft_attn_layer_names = set(layers)

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Nothing: the drafter is the target, which has dummy runs of its own."""

    def draft(self, batch: Batch) -> Drafts:
        """Draft for all requests in one forward."""
        drafts: list[list[int]] = [[] for _ in batch.request_ids]
        rows = np.flatnonzero(batch.limits)
        if not len(rows):
            return Drafts(drafts)
        widths = batch.limits[rows]
        tokens, confidences = self._forward(batch, rows, widths)
        last = np.cumsum(widths)
        for row, start, end in zip(rows, last - widths, last, strict=True):
            drafts[row] = kept(
                tokens[start:end],
                confidences[start:end],
                self.options.threshold,
                stop_ids(batch.parameters[row]),
            )
        self.counts["drafted"] += sum(map(len, drafts))
        return Drafts(drafts)

    def _forward(
        self, batch: Batch, rows: np.ndarray, widths: np.ndarray
    ) -> tuple[list[int], list[float]]:
        """Most probable tokens behind each newest token and its pads.

        Args:
            rows: [N] rows of the batch.
            widths: [N] the newest token and the pads behind it, M in all.

        Returns:
            M tokens and their probabilities.
        """
        ends = np.cumsum(widths)
        offsets = np.arange(ends[-1]) - np.repeat(ends - widths, widths)
        owners = torch.from_numpy(np.repeat(rows, widths)).to(self.device)
        first = batch.num_tokens[rows] - 1
        positions = torch.from_numpy(np.repeat(first, widths) + offsets).to(self.device)
        is_pad = torch.from_numpy(offsets > 0).to(self.device)
        ids = batch.next_token_ids[owners].masked_fill(is_pad, self.pad_token_id)
        table = batch.attention.block_table_tensor
        pages = table[owners, positions // self.block_size].long()
        slots = pages * self.block_size + positions % self.block_size
        starts = torch.from_numpy(np.concatenate(([0], ends))).int()
        lengths = torch.from_numpy(first + widths).int()
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=starts.to(self.device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(self.device),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=len(rows),
                num_actual_tokens=len(ids),
                max_query_len=int(widths.max()),
                max_seq_len=int(lengths.max()),
                block_table_tensor=table[torch.from_numpy(rows).to(self.device)],
                slot_mapping=slots,
            )
        )
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(ids),
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            hidden = self.model(input_ids=ids, positions=positions)
        self.counts.update(forwards=1, rows=len(ids))
        found = [
            self.model.compute_logits(part).float().softmax(-1).max(-1)
            for part in hidden.split(LOGITS_ROWS)
        ]
        return (
            torch.cat([part.indices for part in found]).tolist(),
            torch.cat([part.values for part in found]).tolist(),
        )


def kept(
    tokens: Sequence[int],
    confidences: Sequence[float],
    threshold: float,
    ends: frozenset[int] | set[int],
) -> list[int]:
    """The first token, and those behind it while they are probable enough.

    Args:
        tokens: K of them.
        confidences: K probabilities.
        threshold: A draft ends before a later token that is not more probable.
        ends: Ids that end a text, behind which nothing is drafted.
    """
    draft: list[int] = []
    for token, confidence in zip(tokens, confidences, strict=True):
        if draft and not confidence > threshold:
            break
        draft.append(token)
        if token in ends:
            break
    return draft


def pad_token(options: Lud, config: PretrainedConfig) -> int:
    """The id that is appended: the user's, or what training has left in config.json.

    Raises:
        ValueError: neither names an id of the vocabulary.
    """
    trained = getattr(config, "lud", None)
    trained = trained if isinstance(trained, dict) else {}
    found = options.pad_token_id
    if found is None:
        found = trained.get("pad_token_id")
    if found is None:
        raise ValueError(
            "speculative method 'lud' drafts with checkpoints that were trained for "
            'it, and this one\'s config.json has no "lud". `vllm-dlm train lud` makes '
            'one; of another maker, name the token that was appended: "pad_token_id"'
        )
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(
            f"config.json: lud.pad_token_id must be a token id, not {quote(found)}"
        )
    if not 0 <= found < config.vocab_size:
        raise ValueError(
            f"speculative method 'lud': pad_token_id {found} is outside the "
            f"vocabulary of {config.vocab_size} tokens"
        )
    learnt, drafted = trained.get("tokens"), options.num_speculative_tokens
    if isinstance(learnt, int) and drafted > learnt + 1:
        logger.warning(
            "Drafts of %d tokens append %d pads, and the model was trained with %d: "
            "what it guesses beyond is hardly right. num_speculative_tokens %d uses "
            "what was trained.",
            drafted,
            drafted - 1,
            learnt,
            learnt + 1,
        )
    return found
