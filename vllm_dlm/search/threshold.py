# SPDX-License-Identifier: Apache-2.0
"""AdaDec's threshold for a model: the entropy from which on its first choice is wrong.

Where the model reads right answers, each token has an entropy, and is the model's first
choice or not. A logistic regression tells the two apart by the entropy; the threshold
is the entropy at the cut that tells them apart best (arXiv 2506.08980).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vllm_dlm.search.base import Branch, Driver, Search, Task
from vllm_dlm.search.lookahead import entropy
from vllm_dlm.search.runner import run

SPLIT_SEED = 42
TRAIN_SHARE = 0.8
CUTS = np.arange(1, 100) / 100
"""Probabilities of "not the first choice" that are tried as the cut."""
_ROUNDS = 100
_TOLERANCE = 1e-10
_PENALTY = 1e-6
"""Keeps the fit finite where an entropy separates the two wholly."""


def learn_threshold(entropies: Iterable[float], is_rank_one: Iterable[bool]) -> float:
    """The entropy, in nats, from which on `lookahead` should look.

    Args:
        entropies: of the tokens of right answers, where the model wrote them.
        is_rank_one: whether each was the model's likeliest token.

    Raises:
        ValueError: they are not as many, or all tokens were alike.
    """
    h = np.asarray(list(entropies), np.float64)
    wrong = ~np.asarray(list(is_rank_one), bool)
    if h.shape != wrong.shape:
        raise ValueError(f"{h.size} entropies and {wrong.size} ranks")
    if not np.isfinite(h).all():
        raise ValueError("an entropy is not a finite number")
    classes = [np.flatnonzero(wrong), np.flatnonzero(~wrong)]
    count = min(map(len, classes))
    if count < 2:
        raise ValueError(
            "learning a threshold takes tokens that were the model's first choice, and "
            f"tokens that were not, at least 2 of each; here are {len(classes[1])} and "
            f"{len(classes[0])}"
        )
    draws = np.random.default_rng(SPLIT_SEED)
    # As many of each class: there are far more first choices.
    chosen = np.concatenate([draws.permutation(each)[:count] for each in classes])
    draws.shuffle(chosen)
    train, test = np.split(chosen, [max(2, int(TRAIN_SHARE * len(chosen)))])
    slope, offset = _fit(h[train], wrong[train])
    if slope <= 0:
        raise ValueError(
            "tokens with a higher entropy are the first choice more often here, so no "
            "threshold tells where to look"
        )
    test = test if len(test) else train
    chance = 1 / (1 + np.exp(-(slope * h[test] + offset)))
    right = [(float(np.mean((chance >= cut) == wrong[test])), cut) for cut in CUTS]
    best = max(share for share, _ in right)
    cuts = [cut for share, cut in right if share == best]
    # Of equally good cuts the middle one.
    cut = float(cuts[len(cuts) // 2])
    return max(0.0, float((np.log(cut / (1 - cut)) - offset) / slope))


def _fit(h: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """Slope and offset of a logistic regression, by Newton's method."""
    rows = np.stack([h, np.ones_like(h)], axis=1)
    beta = np.zeros(2)
    for _ in range(_ROUNDS):
        chance = 1 / (1 + np.exp(-np.clip(rows @ beta, -30, 30)))
        slope = rows.T @ (chance - wrong) + _PENALTY * beta
        curve = (rows * (chance * (1 - chance))[:, None]).T @ rows
        step = np.linalg.solve(curve + _PENALTY * np.eye(2), slope)
        beta -= step
        if np.abs(step).max() < _TOLERANCE:
            break
    return float(beta[0]), float(beta[1])


def read_entropies(
    llm: Any, prompts: Sequence[Any], answers: Sequence[str], *, top: int = 20
) -> tuple[list[float], list[bool]]:
    """What `learn_threshold` takes, of a model that reads right answers.

    Args:
        llm: as `search.run` takes it; one request for each token of the answers.
        prompts: as `search.run` takes them.
        answers: the right text behind each prompt.
        top: likeliest tokens whose entropy is computed.

    Returns:
        Of each token of the answers its entropy in nats, and whether it was the
        likeliest.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"{len(prompts)} prompts and {len(answers)} answers")
    entropies: list[float] = []
    is_first: list[bool] = []
    records = [
        {"prompt": prompt, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for result in run(llm, _Reading, records, top=top, use_tqdm=False):
        origin = result.best.origin
        entropies += origin["entropies"]
        is_first += origin["is_first"]
    return entropies, is_first


class _Reading(Driver):
    """Looks at the next token before every token of an answer that is given."""

    name = "reading"
    summary = "read an answer, and note how sure the model was"
    scorer: ClassVar = "unused"
    branches: ClassVar = True

    top: int = Field(default=20, ge=2)

    def search(self, task: Task) -> Search:
        """See `Driver`."""
        if task.to_tokens is None:
            raise ValueError("an endpoint that tells no token ids cannot read answers")
        tokens = task.to_tokens(task.record["answer"])
        starts = [tokens[:length] for length in range(len(tokens))]
        texts = [replace(task.start, written=start) for start in starts]
        tops = yield Branch(texts, self.top)
        return [
            task.candidate(
                replace(task.start, written=tokens),
                entropies=[entropy(top) for top in tops],
                is_first=[
                    top[0][0] == token for top, token in zip(tops, tokens, strict=True)
                ],
            )
        ]
