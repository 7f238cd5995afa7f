# SPDX-License-Identifier: Apache-2.0
"""Jacobi decoding in vLLM, as a drafter: nothing is computed for it.

A block of guesses behind the text is read in one forward, and each guess is replaced by
what the model says of it from the guesses on its left; guesses that no longer change
are the model's own text. vLLM's verification is that forward: up to the first rejection
the guesses were right, and what the model says behind it is the next draft. The rest of
a block are tokens of the prompt, which nobody has guessed yet.

Models gain by it that were trained to come to rest in few forwards: CLLM (arXiv
2403.00835), and CEED-VLA (2506.13725), whose early exit, which takes a block that has
not come to rest, is left out: the text would not be the model's. Drafts are verified as
point masses.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_dlm.spec_decode import drafter
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

_HASH, _MASK, _SHIFT = 2654435761, 0xFFFFFFFF, 8
"""Knuth's multiplicative hash, of whose 32 bits the low ones are poor."""


class JacobiProposer(drafter.FailSafe):
    """Drafts from what the target said of its last draft. `counts`: "rows" drafted
    for, "guessed" tokens of the target in these drafts, "filled" tokens of prompts."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.options = drafter.options_of(vllm_config)
        self.counts: Counter[str] = Counter()
        self._said: list[np.ndarray] = []

    def load_model(self, target: Any) -> None:
        """Look on when the runner samples; called once the target is loaded."""
        sample = self.runner._sample

        def look_on(
            logits: torch.Tensor | None, metadata: SpecDecodeMetadata | None
        ) -> Any:
            # Before sampling, which may write into the logits.
            self._said = [] if logits is None else split(logits, metadata)
            return sample(logits, metadata)

        replace(self.runner, "_sample", look_on)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called by vLLM once a step.

        Args:
            sampled_token_ids: R lists, what each request got in this step: accepted
                guesses and one token more; none while its prompt is being computed.
            num_tokens_no_spec: [R] or longer, length of each text, these included.
            token_ids_cpu: [R or more, max_model_len] int32, the texts.
            slot_mappings: not used.

        Returns:
            R drafts, an empty one for none.
        """

        def draft() -> list[list[int]]:
            limits = drafter.limits(self.runner, self.options.num_speculative_tokens)
            prompts = self.runner.input_batch.num_prompt_tokens
            drafts: list[list[int]] = []
            for row, got in enumerate(sampled_token_ids):
                limit = int(limits[row]) if got else 0
                guessed = behind(self._said[row], len(got), limit)
                filled = fill(
                    token_ids_cpu[row, : prompts[row]],
                    int(num_tokens_no_spec[row]) + len(guessed),
                    limit - len(guessed),
                )
                self.counts.update(
                    rows=limit > 0, guessed=len(guessed), filled=len(filled)
                )
                drafts.append(guessed + filled)
            return drafts

        return self.draft_or_nothing(draft)


def split(
    logits: torch.Tensor, metadata: SpecDecodeMetadata | None
) -> list[np.ndarray]:
    """What the target says at each place of each request's last draft.

    Args:
        logits: [N, V]; of a request with d drafted tokens d + 1 rows, in order.
        metadata: None where no request had a draft.

    Returns:
        R arrays [d + 1] int64: at its newest token, and at each drafted one.
    """
    said = logits.argmax(-1).cpu().numpy()
    if metadata is None:
        return list(said[:, None])
    counts = np.array(metadata.num_draft_tokens) + 1
    return np.split(said, np.cumsum(counts)[:-1])


def behind(said: np.ndarray, emitted: int, limit: int) -> list[int]:
    """What the target says behind the last token that it has emitted.

    Args:
        said: [d + 1] at the newest token of the last step, and at its d guesses.
        emitted: tokens of the step, accepted guesses and one more; 0 for a part of a
            prompt.
        limit: most tokens.
    """
    guesses: list[int] = said[emitted : emitted + limit].tolist()
    return guesses


def fill(prompt: np.ndarray, position: int, count: int) -> list[int]:
    """Tokens of the prompt, for places of which nothing is known.

    Which ones depends on the place alone, so that a seed gives one text.

    Args:
        prompt: [P] int32.
        position: of the first token.
        count: of tokens.
    """
    places = np.arange(position, position + count, dtype=np.int64)
    index = ((places * _HASH & _MASK) >> _SHIFT) % len(prompt)
    chosen: list[int] = prompt[index].tolist()
    return chosen
