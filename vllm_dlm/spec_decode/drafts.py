# SPDX-License-Identifier: Apache-2.0
"""What drafters on either model runner share: drafts, how long they may be, failure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_dlm.config.engine_keys import SPECULATION
from vllm_dlm.spec_decode.options import Options, from_plain

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = init_logger(__name__)


@dataclass(frozen=True)
class Drafts:
    """R drafts of different lengths."""

    tokens: list[list[int]]
    probs: torch.Tensor | None = None
    """[R, K, V] float32, what each token was drawn from, K at least the longest draft;
    None where tokens are verified as if they had been certain."""


class FailSafe:
    """Base of all drafters: one that fails is switched off, requests go on."""

    options: Options
    runner: Any
    failed = False

    @property
    def computes_with_others(self) -> bool:
        """Whether other ranks wait, in a collective operation, for this one's part."""
        return False

    def nothing(self) -> list[list[int]]:
        """An empty draft for each request of the step; model runner V1's batch."""
        return [[] for _ in self.runner.input_batch.req_ids]

    def draft_or_nothing(self, draft: Callable[[], list[list[int]]]) -> list[list[int]]:
        """What `draft` returns; R empty drafts if it fails, and from then on.

        Raises:
            Exception: what `draft` raises, where other ranks would wait for it.
        """
        if not self.failed:
            try:
                return draft()
            except Exception:
                if self.computes_with_others:
                    raise
                self.failed = True
                logger.warning(
                    "Drafting failed (%s). The engine goes on without drafts: texts "
                    "stay right, and come as slowly as without speculation. Restart it "
                    "to draft again.",
                    type(self.options).__name__,
                    exc_info=True,
                )
        return self.nothing()


def options_of(vllm_config: VllmConfig) -> Options:
    """The options that the front end left for the worker."""
    return from_plain(vllm_config.additional_config[SPECULATION])


def share_of(budget: int, num_requests: int, most: int) -> int:
    """Most tokens of a draft in a step of `budget` tokens: an equal share for each.

    Beyond it vLLM would leave drafts out.
    """
    return min(most, budget // max(num_requests, 1) - 1)


def limit_of(
    params: SamplingParams, num_prompt: int, num_output: int, longest: int, most: int
) -> int:
    """Most tokens that a request's draft may have.

    No token behind the last one that the request may still get (verification adds one
    of its own), or that may not be the last; and what the request says.

    Args:
        num_prompt, num_output: tokens of its prompt, and those written.
        longest: the most tokens of a text, the engine's max_model_len.
        most: what the engine takes.
    """
    room = longest - num_prompt
    if params.max_tokens is not None:
        room = min(room, params.max_tokens)
    if num_output < params.min_tokens:
        # Behind a draft that is accepted, vLLM forbids an end of text by the number of
        # tokens before it.
        room = min(room, params.min_tokens)
    return max(0, min(most, room - num_output - 1))


def seed_of(params: SamplingParams | None, request_id: str) -> int:
    """The request's seed, an int64; where it has none a hash of its id."""
    if params is not None and params.seed is not None:
        return params.seed
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def clip(tokens: Sequence[Sequence[int]], most: np.ndarray) -> list[list[int]]:
    """Drafts, cut to what each request may take (vLLM's statistics fail on more)."""
    return [list(row[:limit]) for row, limit in zip(tokens, most, strict=True)]


def make_certain(
    probs: torch.Tensor,
    tokens: Sequence[Sequence[int]],
    parameters: Sequence[SamplingParams],
) -> None:
    """Have drafts of structured outputs verified as point masses.

    The scheduler cuts such a draft before its first token that the grammar forbids:
    whether a token is submitted depends on its own draw, and verification against the
    distribution that it was drawn from would be biased.

    Args:
        probs: [R, K, V], written.
        tokens: R drafts.
        parameters: R.
    """
    for row, (draft, params) in enumerate(zip(tokens, parameters, strict=True)):
        if params.structured_outputs is not None and draft:
            places = torch.arange(len(draft), device=probs.device)
            probs[row, places] = 0
            probs[row, places, torch.tensor(draft, device=probs.device)] = 1
