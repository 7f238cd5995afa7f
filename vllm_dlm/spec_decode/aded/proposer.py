# SPDX-License-Identifier: Apache-2.0
"""ADED as vLLM's "custom_class" drafter: from the model runner to `drafting.py`.

A large batch is searched by several threads: the compiled loops release the GIL.

Drafts are verified as point masses, so the text is the model's own at any temperature.
What a request has taught stays its own, and goes when the request does.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger

from vllm_dlm.spec_decode import drafter
from vllm_dlm.spec_decode.aded import trigram_table
from vllm_dlm.spec_decode.aded.drafting import AdaptiveTrigrams
from vllm_dlm.spec_decode.options import Aded

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

MOST_THREADS = 8
ROWS_PER_THREAD = 8
"""Fewer are searched sooner than a thread wakes up."""


class AdedProposer(drafter.FailSafe):
    """Drafts from tri-grams, for each request of a batch on its own."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = drafter.options_of(vllm_config)
        assert isinstance(options, Aded)
        self.options: Aded = options
        self.model_config = vllm_config.model_config
        self.table = trigram_table.empty_table(self.model_config.get_vocab_size())
        self.requests: dict[str, AdaptiveTrigrams] = {}
        self.counts: Counter[str] = Counter()
        """Drafts made ("rows") and their tokens ("tokens")."""
        self.num_threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self.num_threads, "aded")

    def load_model(self, target: nn.Module) -> None:
        """Read the corpus and compile the loops; called once the target is loaded.

        Raises:
            ValueError: the corpus cannot be read, or is of another vocabulary.
        """
        if self.options.corpus is not None:
            self.table = trigram_table.load_table(
                self.options.corpus,
                self.model_config.get_vocab_size(),
                _fingerprint(self.model_config),
            )
            logger.info(
                "ADED drafts from %d tri-grams of %s, and from each request's text.",
                len(self.table.tokens),
                self.options.corpus,
            )
        text = np.zeros(3, np.int32)
        warm_up = AdaptiveTrigrams(self.table, self.options)
        warm_up.observe(text)
        warm_up.best_chain(text, self.options.num_speculative_tokens)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called by vLLM once a step.

        Args:
            sampled_token_ids: R lists, what each request got in this step; none while
                its prompt is being computed.
            num_tokens_no_spec: [R] or longer, length of each text, these included.
            token_ids_cpu: [R or more, max_model_len] int32, the texts.
            slot_mappings: not used.

        Returns:
            R drafts, an empty one for none.
        """

        def draft() -> list[list[int]]:
            self._forget_finished()
            most = self.options.num_speculative_tokens
            limits = drafter.limits(self.runner, most)
            drafts: list[list[int]] = [[] for _ in sampled_token_ids]
            names = self.runner.input_batch.req_ids

            def draft_rows(rows: list[int]) -> None:
                for row in rows:
                    text = token_ids_cpu[row, : num_tokens_no_spec[row]]
                    drafts[row] = self.draft(names[row], text, int(limits[row]))

            rows = [row for row, got in enumerate(sampled_token_ids) if got]
            rows = [row for row in rows if limits[row]]
            parts = min(self.num_threads, -(-len(rows) // ROWS_PER_THREAD))
            if parts > 1:
                shares = [rows[part::parts] for part in range(parts)]
                list(self._threads.map(draft_rows, shares))  # raises what they raise
            else:
                draft_rows(rows)
            self.counts.update(rows=len(rows), tokens=sum(map(len, drafts)))
            return drafts

        return self.draft_or_nothing(draft)

    def draft(self, request: str, text: np.ndarray, most: int) -> list[int]:
        """At most `most` tokens to follow a request's text, which it is taught."""
        if len(text) < 2:
            return []
        trigrams = self.requests.get(request)
        if trigrams is None or trigrams.num_seen > len(text):
            trigrams = AdaptiveTrigrams(self.table, self.options)
            self.requests[request] = trigrams
        trigrams.observe(text)
        return trigrams.best_chain(text, most)

    def _forget_finished(self) -> None:
        known = self.runner.requests
        for request in [name for name in self.requests if name not in known]:
            del self.requests[request]


def _fingerprint(model_config: ModelConfig) -> str | None:
    """Fingerprint of the model's tokenizer; None if the engine has none."""
    if model_config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    return trigram_table.fingerprint(cached_tokenizer_from_config(model_config))
