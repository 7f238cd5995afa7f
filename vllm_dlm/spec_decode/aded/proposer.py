# SPDX-License-Identifier: Apache-2.0
"""ADED as vLLM's "custom_class" drafter: from the model runner to `drafting.py`.

A large batch is searched by several threads: the compiled loops release the GIL.

Drafts are verified as point masses, so the text is the model's own at any temperature.
A shared memory is taught row by row before any row is searched, which only reads it.
With tensor parallelism every rank does the same with the same texts, and vLLM asks one
rank alone for its drafts: a memory that differs elsewhere could not matter.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger
from vllm.sampling_params import SamplingType

from vllm_dlm.config.stop_ids import stop_ids
from vllm_dlm.spec_decode import drafter
from vllm_dlm.spec_decode.aded import trigram_table
from vllm_dlm.spec_decode.aded.drafting import MEMORY_SIZE, AdaptiveTrigrams, Memory
from vllm_dlm.spec_decode.options import Aded, request_limit

if TYPE_CHECKING:
    from torch import nn
    from vllm import SamplingParams
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
        self.shared: Memory | None = None
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
                "ADED drafts from %d tri-grams of %s, and from %s.",
                len(self.table.tokens),
                self.options.corpus,
                "the texts of all requests"
                if self.options.memory == "shared"
                else "each request's text",
            )
        self.forget()
        # No request waits for a loop to be compiled.
        warm_up = Memory(self.table, self.options, size=100)
        text = (np.arange(100) % self.table.vocab_size).astype(np.int32)
        for taught in (text, text[::-1], text):  # grows, and forgets
            warm_up.learn(np.ascontiguousarray(taught), 2)
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
            texts = [
                token_ids_cpu[row, : num_tokens_no_spec[row]]
                for row in range(len(drafts))
            ]

            def draft_rows(rows: list[int]) -> None:
                for row in rows:
                    drafts[row] = self.draft(names[row], texts[row], int(limits[row]))

            rows = [row for row, got in enumerate(sampled_token_ids) if got]
            for row in rows:
                self.teach(names[row], texts[row], len(sampled_token_ids[row]))
            # A row with a limit was taught.
            rows = [row for row in rows if limits[row] and len(texts[row]) > 1]
            parts = min(self.num_threads, -(-len(rows) // ROWS_PER_THREAD))
            if parts > 1:
                shares = [rows[part::parts] for part in range(parts)]
                list(self._threads.map(draft_rows, shares))  # raises what they raise
            else:
                draft_rows(rows)
            self.counts.update(rows=len(rows), tokens=sum(map(len, drafts)))
            return drafts

        return self.draft_or_nothing(draft)

    def teach(self, request: str, text: np.ndarray, num_new: int) -> None:
        """Learn from a round of a request, if it wants drafts at all.

        Args:
            text: [n] int32, all tokens of the request.
            num_new: how many of them came in this round.
        """
        params = self.runner.requests[request].sampling_params
        if params is None:
            return
        if not request_limit(params.extra_args, self.runner.num_spec_tokens):
            return
        # What was accepted behind the end of the text is no part of it.
        ends = np.isin(text[len(text) - num_new :], list(stop_ids(params)))
        if ends.any():
            text = text[: len(text) - num_new + ends.argmax() + 1]
        trigrams = self.requests.get(request)
        if trigrams is None or trigrams.num_seen > len(text):
            memory = None if _is_seeded(params) else self.shared
            trigrams = AdaptiveTrigrams(self.table, self.options, memory)
            self.requests[request] = trigrams
        trigrams.observe(text)

    def draft(self, request: str, text: np.ndarray, most: int) -> list[int]:
        """At most `most` tokens to follow a request's text of 2 tokens or more."""
        return self.requests[request].best_chain(text, most)

    def forget(self) -> None:
        """Forget what requests have taught."""
        self.requests.clear()
        self.shared = None
        if self.options.memory == "shared":
            size = self.options.memory_size or MEMORY_SIZE
            self.shared = Memory(self.table, self.options, size)

    def _forget_finished(self) -> None:
        known = self.runner.requests
        for request in [name for name in self.requests if name not in known]:
            del self.requests[request]


def _is_seeded(params: SamplingParams) -> bool:
    """Whether a text is a function of its seed: not if drafts depended on others."""
    return params.sampling_type == SamplingType.RANDOM_SEED


def _fingerprint(model_config: ModelConfig) -> str | None:
    """Fingerprint of the model's tokenizer; None if the engine has none."""
    if model_config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    return trigram_table.fingerprint(cached_tokenizer_from_config(model_config))
