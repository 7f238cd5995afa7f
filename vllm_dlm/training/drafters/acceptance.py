# SPDX-License-Identifier: Apache-2.0
"""How many drafted tokens a greedy target accepts, counted without running it.

A greedy target accepts a draft exactly as far as it agrees with what the target writes
alone. With the target's answers on record, a round of speculative decoding is therefore
one call of the drafter and a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_dlm.training.drafters.teacher import Answered


@dataclass(frozen=True)
class Acceptance:
    """Counts over all answers."""

    rounds: int
    """Forwards of the target that verify a draft, one per answer and round."""
    drafted: int
    accepted: int
    tokens: int
    """Tokens of all answers, their ends included."""
    answers: int

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def share_accepted(self) -> float:
        """Share of the drafted tokens; those behind an answer's end are not counted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward of the target, those that read the prompts included."""
        return self.tokens / (self.rounds + self.answers)


def measure_acceptance(
    draft: Callable[[list[list[int]]], list[list[int]]], answered: Answered
) -> Acceptance:
    """Play greedy speculative decoding against recorded greedy answers.

    As in vLLM, the forward that reads the prompt gives the first token; each round
    after it drafts, accepts, and adds a token of the target.

    Args:
        draft: Drafts, of any lengths, for a list of prefixes.
        answered: Prompts and the target's greedy answers.
    """
    places = [1] * len(answered.answers)
    rounds = drafted = accepted = 0
    while True:
        active = [
            row
            for row, answer in enumerate(answered.answers)
            if places[row] < len(answer)
        ]
        if not active:
            break
        prefixes = [
            answered.prompts[row] + answered.answers[row][: places[row]]
            for row in active
        ]
        for row, tokens in zip(active, draft(prefixes), strict=True):
            rest = answered.answers[row][places[row] :]
            tokens = tokens[: len(rest)]
            agreed = 0
            while agreed < len(tokens) and tokens[agreed] == rest[agreed]:
                agreed += 1
            rounds += 1
            drafted += len(tokens)
            accepted += agreed
            places[row] += agreed + 1
    return Acceptance(
        rounds=rounds,
        drafted=drafted,
        accepted=accepted,
        tokens=sum(len(answer) for answer in answered.answers),
        answers=len(answered.answers),
    )
