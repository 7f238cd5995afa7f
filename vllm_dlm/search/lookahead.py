# SPDX-License-Identifier: Apache-2.0
"""Look-ahead: one text, and at some tokens a look at what would follow each.

AdaDec (arXiv 2506.08980) looks where the next token is uncertain, and takes the token
behind which the model is surest. Transfer Q* (arXiv 2405.20495) looks at every token,
lets an aligned model write on behind it, and adds what a scorer thinks of that.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vllm_dlm.search.base import (
    Branch,
    Driver,
    Extend,
    Kind,
    Score,
    Scorer,
    Search,
    Step,
    Steps,
    Task,
    Text,
    Token,
)

ADADEC, TRANSFER = "adadec", "transfer"

PUBLISHED = "deepseek-coder 1.3b .985, 6.7b 1.134; stable-code 3b 1.100; Qwen3 .6b "
PUBLISHED += "1.321, 1.7b .615, 4b .713, 8b .706"
"""Thresholds of AdaDec's paper, in nats."""


class Lookahead(Driver):
    """See the module docstring."""

    name = "lookahead"
    summary = "one text; uncertain tokens are chosen by what follows (AdaDec, TQ*)"
    paper = "AdaDec, arXiv 2506.08980; Transfer Q*, 2405.20495"
    scorer: ClassVar = "optional"
    branches: ClassVar = True

    method: Literal["adadec", "transfer"] = Field(
        default="adadec",
        description="adadec: look where the entropy is at least tau, without a "
        "scorer. transfer: look at every token, with one.",
    )
    tau: float | None = Field(
        default=None,
        ge=0,
        description="Of adadec, required: entropy in nats from which on it looks. "
        f"learn_threshold finds it for a model; published: {PUBLISHED}.",
    )
    k: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that are compared. Default: adadec 3, transfer 10.",
    )
    horizon: int | None = Field(
        default=None,
        ge=1,
        description="Tokens written behind each, greedily. Default: adadec 5, "
        "transfer 20, with a baseline 5.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of the text. Default: adadec 512, transfer 128.",
    )
    top: int = Field(
        default=20,
        ge=2,
        description="Of adadec: likeliest tokens whose entropy is computed; all others "
        "count as one.",
    )
    weight: float | None = Field(
        default=None, description="Of transfer: of a score, beside log-probabilities; 1"
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        description="Of transfer: draw the token with this temperature; 0 for the "
        "best. Default: 0.",
    )
    baseline: Scorer | None = Field(
        default=None,
        description="Of transfer: a second scorer, that which the aligned model was "
        "aligned to; scores then count as exp((score - baseline) / 2) * score.",
    )
    continue_with: Any = Field(
        default=None,
        description="Of transfer: the aligned model that writes behind the tokens, "
        "with the same tokenizer. Default: the same model.",
    )

    @model_validator(mode="after")
    def _options_fit_the_method(self) -> Self:
        of_transfer = ("weight", "temperature", "baseline", "continue_with")
        wrong = of_transfer if self.method == ADADEC else ("tau",)
        for option in wrong:
            if getattr(self, option) is not None:
                other = TRANSFER if self.method == ADADEC else ADADEC
                raise ValueError(
                    f"{option} is an option of the method {other!r}, and the method is "
                    f"{self.method!r}"
                )
        if self.method == ADADEC and self.tau is None:
            raise ValueError(
                "adadec needs tau, an entropy in nats that depends on the model: "
                "learn_threshold finds it (docs/search.md)"
            )
        if self.method == ADADEC and self.width > self.top:
            raise ValueError(
                f"k {self.width}: only the {self.top} likeliest tokens are seen (top)"
            )
        return self

    @property
    def width(self) -> int:
        """Tokens that are compared."""
        return self.k or (3 if self.method == ADADEC else 10)

    @property
    def most(self) -> int:
        """Most tokens of the text."""
        return self.max_tokens or (512 if self.method == ADADEC else 128)

    @property
    def reach(self) -> int:
        """Tokens written behind each."""
        if self.horizon is not None:
            return self.horizon
        return 5 if self.method == ADADEC or self.baseline is not None else 20

    def scorers(self) -> Sequence[Scorer]:
        """See `Driver`."""
        return () if self.baseline is None else (self.baseline,)

    def engines(self) -> Sequence[Any]:
        """See `Driver`."""
        return () if self.continue_with is None else (self.continue_with,)

    def check(self, kind: Kind, has_scorer: bool) -> None:
        """See `Driver`."""
        if has_scorer and self.method == ADADEC:
            raise ValueError(
                "adadec asks no scorer: leave it out, or set method to 'transfer'"
            )
        if not has_scorer and self.method == TRANSFER:
            raise ValueError("transfer needs a scorer")

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        text, looks = task.start, 0
        while not text.finished:
            asked = self.top if self.method == ADADEC else self.width
            (top,) = yield Branch([text], asked)
            if self.method == ADADEC and entropy(top) < self.tau:  # type: ignore[operator]
                token, logprob = top[0]
            else:
                looks += 1
                choices = top[: self.width]
                if self.method == ADADEC:
                    values = yield from self._likelihoods(task, text, choices)
                else:
                    values = yield from self._values(task, text, choices)
                token, logprob = choices[self._chosen(task, text, values)]
            text = task.write(text, token, logprob, self.most)
        score = None
        if self.method == TRANSFER:
            (score,) = yield Score([text])
        return [task.candidate(text, score, looks=looks)]

    def _followed(
        self, task: Task, text: Text, choices: Sequence[tuple[Token, float]]
    ) -> Steps:
        """The texts with each choice, and what follows it, behind them."""
        texts = [task.write(text, token, lp, self.most) for token, lp in choices]
        growing = [each for each in texts if not each.finished]
        if not growing:
            return texts
        pieces = yield Extend(
            growing, self.most, Step(tokens=self.reach), engine=len(self.engines())
        )
        longer = {
            each: task.add(each, piece)
            for each, (piece,) in zip(growing, pieces, strict=True)
        }
        return [longer.get(each, each) for each in texts]

    def _likelihoods(
        self, task: Task, text: Text, choices: Sequence[tuple[Token, float]]
    ) -> Steps:
        """AdaDec's: the mean log-probability of a choice and of what follows."""
        texts = yield from self._followed(task, text, choices)
        return [
            (longer.logprob - text.logprob) / (len(longer.written) - len(text.written))
            for longer in texts
        ]

    def _values(
        self, task: Task, text: Text, choices: Sequence[tuple[Token, float]]
    ) -> Steps:
        """Transfer Q*'s: the log-probability of a choice, and its reward."""
        texts = yield from self._followed(task, text, choices)
        rewards = yield Score(texts)
        if self.baseline is not None:
            others = yield Score(texts, scorer=1)
            rewards = [
                math.exp(0.5 * (target - base)) * target
                for target, base in zip(rewards, others, strict=True)
            ]
        weight = 1.0 if self.weight is None else self.weight
        return [
            logprob + weight * reward
            for (_, logprob), reward in zip(choices, rewards, strict=True)
        ]

    def _chosen(self, task: Task, text: Text, values: Sequence[float]) -> int:
        if not self.temperature:
            return max(range(len(values)), key=values.__getitem__)
        most = max(values)
        weights = [math.exp((value - most) / self.temperature) for value in values]
        draws = random.Random(f"{self.seed}-{task.index}-{text.written}")
        return draws.choices(range(len(values)), weights)[0]


def entropy(top: Sequence[tuple[Token, float]]) -> float:
    """Nats of the next token's distribution, all unseen tokens taken for one."""
    probabilities = [math.exp(logprob) for _, logprob in top]
    rest = 1 - math.fsum(probabilities)
    parts = [*probabilities, rest]
    return -math.fsum(part * math.log(part) for part in parts if part > 0)
