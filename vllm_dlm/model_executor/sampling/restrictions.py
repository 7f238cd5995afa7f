# SPDX-License-Identifier: Apache-2.0
"""Restriction: which tokens a request's sampling parameters favour or forbid.

`logit_bias`, `allowed_token_ids`, `min_tokens` and `bad_words`, made into tensors when
the request is admitted, and applied to its rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.model_executor.sampling.bad_words import BadWords

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts, RequestFacts


def known_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """The ids that the model has tokens for, each once, in order.

    The others are never written. The configs of a model and of its tokenizer may name
    some, as ends of text say, and so may words that are cut into tokens.

    Args:
        vocab_size: columns of the logits.
    """
    return sorted({token for token in ids if 0 <= token < vocab_size})


@dataclass(frozen=True)
class Restriction:
    """Token restrictions of one request, as tensors."""

    biased: torch.Tensor
    """[k] int64 token ids of `logit_bias`."""
    bias: torch.Tensor
    """[k] float32."""
    allowed: torch.Tensor | None
    """[k] int64: `allowed_token_ids`; None for all."""
    ending: torch.Tensor
    """[k] int64: what may not be written while the text is short of `min_tokens`."""
    bad_words: BadWords | None
    bad_tokens: torch.Tensor
    """[k] int64: the bad words that are one token."""
    widening: torch.Tensor
    """[k] int64: what may not be written while an elastic hole cannot widen."""

    @classmethod
    def of(cls, request: RequestFacts, engine: EngineFacts) -> Restriction | None:
        """The restriction of a request; None if all tokens may be written."""
        params, expands = request.params, engine.defaults.expand_token
        vocab_size, device = engine.vocab_size, engine.device
        words = [
            word
            for word in params.bad_words_token_ids or []
            if len(known_ids(word, vocab_size)) == len(set(word))
        ]
        widening = []
        if expands is not None and request.layout.is_elastic:
            widening.append(expands)
        elif expands is not None:
            words.append([expands])
        allowed = known_ids(params.allowed_token_ids or (), vocab_size)
        ends = {*params.all_stop_token_ids, *request.stop_ids}
        if request.layout.canvas is not None:
            ends |= request.closing_ids
        ending = known_ids(ends, vocab_size) if request.min_tokens else []
        biases = params.logit_bias or {}
        bias = {token: biases[token] for token in known_ids(biases, vocab_size)}
        if not (bias or allowed or ending or words or widening):
            return None
        bad_words = BadWords(words) if words else None
        single = bad_words.single if bad_words else []
        return cls(
            torch.tensor(list(bias), dtype=torch.int64, device=device),
            torch.tensor(list(bias.values()), dtype=torch.float32, device=device),
            torch.tensor(allowed, device=device) if allowed else None,
            torch.tensor(ending, dtype=torch.int64, device=device),
            bad_words,
            torch.tensor(single, dtype=torch.int64, device=device),
            torch.tensor(widening, dtype=torch.int64, device=device),
        )

    @property
    def is_early(self) -> bool:
        """Whether `min_tokens` alone restricts: later positions are not restricted."""
        return not (
            len(self.biased)
            or self.allowed is not None
            or self.bad_words
            or len(self.widening)
        )

    def apply(
        self,
        logits: torch.Tensor,
        early: torch.Tensor,
        offsets: np.ndarray,
        banned: list[tuple[int, int]],
        cannot_widen: torch.Tensor | None = None,
    ) -> None:
        """Change logits in place.

        Args:
            logits: [n, V] float32, rows of the request.
            early: [n] bool: where `min_tokens` forbids the text to end.
            offsets: [n], each row's place in the block.
            banned: (place in the block, token) that would complete a bad word of
                several tokens.
            cannot_widen: bool, of no dimension: whether the hole cannot; None without
                an elastic one.
        """
        logits[:, self.biased] += self.bias
        if self.allowed is not None:
            kept = logits[:, self.allowed]
            logits.fill_(-torch.inf)
            logits[:, self.allowed] = kept
        if len(self.ending):
            ending = logits[:, self.ending]
            logits[:, self.ending] = ending.masked_fill(early[:, None], -torch.inf)
        if len(self.widening) and cannot_widen is not None:
            widening = logits[:, self.widening]
            widening = widening.masked_fill(cannot_widen, -torch.inf)
            logits[:, self.widening] = widening
        if self.bad_words is not None:
            before = None if self.allowed is None else logits[:, self.allowed]
            self._ban_words(logits, offsets, banned)
            if before is not None:
                # A text must end, also where every allowed token completes a word.
                left = logits[:, self.allowed]
                stuck = left.amax(dim=1, keepdim=True) == -torch.inf
                logits[:, self.allowed] = torch.where(stuck, before, left)

    def _ban_words(
        self, logits: torch.Tensor, offsets: np.ndarray, banned: list[tuple[int, int]]
    ) -> None:
        """Ban the bad words' tokens, for `apply`."""
        logits[:, self.bad_tokens] = -torch.inf
        row_of = {offset: row for row, offset in enumerate(offsets.tolist())}
        pairs = [(row_of[place], token) for place, token in banned if place in row_of]
        if pairs:
            rows, tokens = torch.tensor(pairs, device=logits.device).unbind(dim=1)
            logits[rows, tokens] = -torch.inf
