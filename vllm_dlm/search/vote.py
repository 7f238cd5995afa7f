# SPDX-License-Identifier: Apache-2.0
"""Voting: answers drawn in several ways, of which the most frequent wins.

The ways are seeds, and `dlm` options of a diffusion model: HEX (arXiv 2510.05040) asks
for the same answer in blocks of five lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from vllm_dlm.search.base import Candidate, Complete, Driver, Kind, Search, Task
from vllm_dlm.search.best_of_n import check_draws

HEX_LENGTHS = 5
"""Block lengths of HEX: of G tokens G / 32, and twice the last one four times."""
HEX_SHORTEST = 32

Key = Callable[[str], Hashable]


class Vote(Driver):
    """See the module docstring. Ties go to the votes with the higher mean
    log-probability per token, then to the earlier."""

    name = "vote"
    summary = "draw answers in several ways, keep the most frequent"
    paper = "HEX, arXiv 2510.05040; self-consistency, 2203.11171"
    scorer: ClassVar = "unused"

    n: int | None = Field(
        default=None,
        ge=1,
        description="Seeds of each variant. Default: 8, with `hex` 1.",
    )
    temperature: float | None = Field(
        default=None, ge=0, description="Of the draws. Default: 1, with `hex` 0."
    )
    max_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    variants: list[dict[str, Any]] | None = Field(
        default=None,
        min_length=1,
        description="Of a diffusion model: `dlm` options of each way to ask, a list of "
        "JSON objects.",
    )
    hex: bool = Field(
        default=False,
        description="The variants of HEX: blocks of max_tokens/32 positions, and "
        "twice, 4, 8 and 16 times as many; strategy static, a step for two tokens.",
    )
    key: Key | None = Field(
        default=None,
        description="What is counted: text -> anything hashable, None for no vote. "
        "Default: the stripped text.",
    )

    @model_validator(mode="after")
    def _variants_differ(self) -> Self:
        if self.hex and self.variants is not None:
            raise ValueError("hex fills the variants: leave one of the two out")
        if self.hex and self.max_tokens % HEX_SHORTEST:
            raise ValueError(
                f"hex divides max_tokens by {HEX_SHORTEST}: {self.max_tokens} is no "
                f"multiple of it, such as {HEX_SHORTEST}, 128, 256"
            )
        check_draws(self.seeds, self.heat)
        return self

    @property
    def seeds(self) -> int:
        """Draws of each variant."""
        return self.n or (1 if self.hex else 8)

    @property
    def heat(self) -> float:
        """The temperature of the draws."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.hex else 1.0

    def request_options(self) -> Sequence[Mapping[str, Any]]:
        """See `Driver`."""
        if self.hex:
            shortest = self.max_tokens // HEX_SHORTEST
            return [
                {
                    "strategy": "static",
                    "block_length": shortest << i,
                    "steps": self.max_tokens // 2,
                }
                for i in range(HEX_LENGTHS)
            ]
        return self.variants or [{}]

    def check(self, kind: Kind, has_scorer: bool) -> None:
        """See `Driver`."""
        if kind == "autoregressive" and (self.hex or self.variants is not None):
            raise ValueError(
                "hex and variants are options of diffusion models, and this model "
                "writes token by token; vote over seeds: n, temperature"
            )
        if self.hex and kind in ("block", "causal"):
            raise ValueError(
                f"hex asks for blocks of other lengths, and a model with {kind} "
                "attention is trained for one; vote over seeds: n, temperature"
            )

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        found: list[Candidate] = []
        for variant, options in enumerate(self.request_options()):
            (pieces,) = yield Complete(
                [task.start],
                self.max_tokens,
                n=self.seeds,
                temperature=self.heat,
                options=options,
            )
            found += [
                task.candidate(task.add(task.start, piece), variant=variant, seed=i)
                for i, piece in enumerate(pieces)
            ]
        return count_votes(found, self.key or str.strip)


def count_votes(candidates: Sequence[Candidate], key: Key) -> list[Candidate]:
    """One candidate for each answer, the likeliest of its voters, the winner first.

    Texts without a vote follow, the likeliest first.

    Returns:
        Candidates whose score, and `origin["votes"]`, is the number of votes.
    """
    groups: dict[Hashable, list[Candidate]] = {}
    silent: list[Candidate] = []
    for candidate in candidates:
        vote = key(candidate.text)
        if vote is None:
            silent.append(candidate)
        else:
            groups.setdefault(vote, []).append(candidate)

    def likelihood(candidate: Candidate) -> float:
        return candidate.state.mean_logprob

    def standing(voters: list[Candidate]) -> tuple[int, float]:
        return len(voters), sum(map(likelihood, voters)) / len(voters)

    order = sorted(groups.values(), key=standing, reverse=True)
    chosen = [(max(voters, key=likelihood), len(voters)) for voters in order]
    chosen += [(each, 0) for each in sorted(silent, key=likelihood, reverse=True)]
    for candidate, votes in chosen:
        candidate.score = float(votes)
        candidate.origin["votes"] = votes
    return [candidate for candidate, _ in chosen]
