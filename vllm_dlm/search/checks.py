# SPDX-License-Identifier: Apache-2.0
"""What drivers and scorers return, which other people write: checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllm_dlm.messages import quote
from vllm_dlm.search.base import Candidate, Task


def checked_candidates(found: Any, task: Task) -> list[Candidate]:
    """What a search returned.

    Raises:
        TypeError: it is no list of candidates.
    """
    is_list = isinstance(found, list) and found
    if not is_list or not all(isinstance(one, Candidate) for one in found):
        raise TypeError(
            f"the search of prompt {task.index} returned {quote(found)}: a driver "
            "returns its candidates, the best first, and at least one"
        )
    return found


def checked_scores(scores: Any, candidates: Sequence[Candidate]) -> list[float]:
    """What a scorer returned, as floats.

    Raises:
        ValueError: not one number for each candidate.
    """
    expected = f"a scorer returns a sequence of {len(candidates)} numbers here, "
    expected += "one for each candidate"
    try:
        scores = list(scores)
    except TypeError:
        raise ValueError(f"{expected}; it returned {quote(scores)}") from None
    if len(scores) != len(candidates):
        raise ValueError(f"{expected}; it returned {len(scores)}")
    numbers = []
    for score, candidate in zip(scores, candidates, strict=True):
        where = f"the score of prompt {candidate.index}"
        try:
            if isinstance(score, str):
                raise TypeError
            number = float(score)
        except (TypeError, ValueError):
            raise ValueError(f"{where} is {quote(score)}, and no number") from None
        if math.isnan(number):
            raise ValueError(f"{where} is nan; -inf is the lowest that a score can be")
        numbers.append(number)
    return numbers
