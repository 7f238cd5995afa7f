# SPDX-License-Identifier: Apache-2.0
"""ADED as vLLM's "custom_class" drafter: the glue between model runner and `aded.py`.

Drafts are verified as point masses, so the text is the model's own at any temperature.
What a request has taught stays its own, and goes when the request does.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.logger import init_logger

from vllm_dlm.spec_decode import drafter, trigram_table
from vllm_dlm.spec_decode.aded import AdaptiveTrigrams
from vllm_dlm.spec_decode.options import Aded

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)


class AdedProposer:
    """Drafts from tri-grams, for all requests of a batch in turn."""

    runner: Any
    """The model runner; the worker sets it."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        options = drafter.options_of(vllm_config)
        assert isinstance(options, Aded)
        self.options = options
        self.model_config = vllm_config.model_config
        self.table = trigram_table.empty_table(self.model_config.get_vocab_size())
        self.requests: dict[str, AdaptiveTrigrams] = {}
        self.counts: Counter[str] = Counter()
        """Drafts made ("rows") and their tokens ("tokens")."""
        self.failed = False

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
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        if self.failed:
            return drafts
        try:
            self._forget_finished()
            most = self.options.num_speculative_tokens
            limits = drafter.limits(self.runner, most)
            for row, request in enumerate(self.runner.input_batch.req_ids):
                if limits[row] and sampled_token_ids[row]:
                    text = token_ids_cpu[row, : num_tokens_no_spec[row]]
                    drafts[row] = self.draft(request, text, int(limits[row]))
        except Exception:
            self.failed = True
            drafter.warn_of_failure(self.options)
            return [[] for _ in sampled_token_ids]
        return drafts

    def draft(self, request: str, text: np.ndarray, most: int) -> list[int]:
        """At most `most` tokens to follow a request's text, which it is taught."""
        if len(text) < 2:
            return []
        trigrams = self.requests.get(request)
        if trigrams is None or trigrams.num_seen > len(text):
            trigrams = AdaptiveTrigrams(self.table, self.options)
            self.requests[request] = trigrams
        trigrams.observe(text)
        draft = trigrams.best_chain(text, most)
        self.counts.update(rows=1, tokens=len(draft))
        return draft

    def _forget_finished(self) -> None:
        known = self.runner.requests
        for request in [name for name in self.requests if name not in known]:
            del self.requests[request]


def _fingerprint(model_config: ModelConfig) -> str | None:
    """Of the model's tokenizer; None if the engine was started without one."""
    if model_config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    return trigram_table.fingerprint(cached_tokenizer_from_config(model_config))
