# SPDX-License-Identifier: Apache-2.0
"""Constrained texts: what a request with a pattern has, and its block in a step.

`constrained.py` says when each of it is made, `constrained_rows.py` measures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.constraints.paths import (
    BEST,
    OPEN,
    SECOND,
    SPREAD,
    TOKEN,
    TOTAL,
    Completions,
    Drawing,
    Problem,
    Solution,
    feasible,
    unread,
)
from vllm_dlm.model_executor.host_slots import ToHost
from vllm_dlm.model_executor.planning.block_rows import upload
from vllm_dlm.strategies import STRATEGIES

if TYPE_CHECKING:
    from vllm_dlm.constraints.automaton import Automaton
    from vllm_dlm.model_executor.facts import RequestFacts
    from vllm_dlm.model_executor.patterns import Pattern
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.sampling.scheduled import Scheduled


@dataclass
class Text:
    """The text of one request."""

    slot: int
    request: RequestFacts
    pattern: Pattern
    completions: Completions
    draft_tokens: np.ndarray
    """[max_tokens] int64: what its strategy has drafted."""
    draft_rank: np.ndarray
    """[max_tokens] int64: as in `Decision`."""
    output: np.ndarray
    """[max_tokens] int64: its tokens; of no meaning where it is masked. What follows a
    gap that the request has opened (`suffix`) is not of it."""
    state: int
    """Of the automaton, left of `state_at`."""
    state_at: int
    """Output position."""
    bias: tuple[torch.Tensor, torch.Tensor] | None
    """Tokens of `logit_bias`, and what is added to their logits."""

    @property
    def automaton(self) -> Automaton:
        return self.pattern.automaton

    @property
    def draws(self) -> bool:
        return self.request.params.temperature > 0

    @property
    def has_branches(self) -> bool:
        """Whether a forward may evaluate canvases with drafts beside its own."""
        config = self.request.config
        return STRATEGIES[config.strategy].branches(config.params) > 1

    @property
    def in_order(self) -> bool:
        """Whether tokens are chosen from the left on; see `Problem`."""
        return STRATEGIES[self.request.config.strategy].verifies

    @property
    def writes_best(self) -> bool:
        """Whether the most probable path is written, whatever is drawn."""
        return STRATEGIES[self.request.config.strategy].writes == "best"

    @property
    def truncates(self) -> bool:
        params = self.request.params
        return self.draws and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


@dataclass
class Step:
    """What a request's active block is in this step, or a branch of it."""

    text: Text
    block_start: int
    """Absolute position."""
    begin: int
    """Output position of the first of the n that are weighed."""
    fixed: np.ndarray
    """[n] int64: classes of what is written; `OPEN` elsewhere."""
    row_at: np.ndarray
    """[n] int64: the row of logits of each, negative for none."""
    end: np.ndarray
    """[S] bool: states behind the last one from which the text can be completed."""
    noise: int
    """Which step's noise is drawn with: see `Views.drawn`."""
    number: int
    """Which of its group's requests, or of their branches, it is."""
    scheduled: Scheduled | None
    """The group's, where its strategy sets the temperature."""
    rows: list[slice] = field(default_factory=list)
    """Rows of logits that were measured for it, tile by tile."""
    measured: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """What was measured of them; see `constrained_rows.measure`."""
    solved: tuple[Problem, Solution] | None = None
    """None where no path was found."""

    @property
    def read(self) -> np.ndarray:
        """[n] bool: positions whose logits are read, open ones and others."""
        is_read: np.ndarray = self.row_at >= 0
        return is_read

    @property
    def rows_read(self) -> np.ndarray:
        """Rows of logits that get a candidate of the path."""
        rows: np.ndarray = self.row_at[self.read]
        return rows

    @property
    def early(self) -> np.ndarray:
        """[n] bool: positions at which the text must not end."""
        positions = self.begin + np.arange(len(self.fixed))
        is_early: np.ndarray = positions < self.text.request.min_tokens
        return is_early

    def feasible(self) -> np.ndarray:
        """[n, K + 1] bool: classes that some path takes; last, no class."""
        text = self.text
        usable = np.ones((len(self.fixed), text.pattern.num_classes), dtype=bool)
        usable[self.early, text.automaton.end_class] = False
        found = feasible(text.pattern.graph, text.state, self.end, self.fixed, usable)
        return np.pad(found, ((0, 0), (0, 1)))


def problems_of(steps: list[Step]) -> list[Problem]:
    """What the steps' paths are looked for in, once the device has measured it.

    What was measured is taken off the steps.
    """
    arrived = _to_host(
        [
            torch.cat([part[name] for part in step.measured]).flatten()
            for step in steps
            for name in step.measured[0]
        ]
    )
    problems, numbers = [], iter(arrived)
    for step in steps:
        text, count = step.text, len(step.fixed)
        num_classes = text.pattern.num_classes
        read = step.read
        rows = np.concatenate([np.arange(r.start, r.stop) for r in step.rows])
        own = np.searchsorted(rows, step.row_at[read])

        def placed(
            default: np.ndarray,
            read: np.ndarray = read,
            own: np.ndarray = own,
            num_rows: int = len(rows),
        ) -> np.ndarray:
            values = next(numbers).reshape(num_rows, *default.shape[1:])
            default[read] = values[own]
            return default

        parts = placed(unread(count, num_classes))
        drawing = None
        if text.draws:
            drawn = {
                name: placed(np.zeros((count, num_classes)))
                for name in step.measured[0]
                if name != "parts"
            }
            drawing = Drawing(drawn.pop("weights", None), **drawn)
        early, end_class = step.early, text.automaton.end_class
        parts[early, end_class, BEST] = -np.inf
        if drawing is not None and drawing.weights is not None:
            drawing.weights[early, end_class] = -np.inf
        if step.scheduled is not None:
            _as_one_end(parts, drawing, end_class)
        problems.append(
            Problem(
                text.pattern.graph,
                text.state,
                step.end,
                step.fixed,
                parts,
                drawing,
                reread=read & (step.fixed != OPEN),
                in_order=text.in_order,
                also_best=text.writes_best,
            )
        )
        # On the device it would stay until the next step.
        step.measured.clear()
    return problems


def _as_one_end(parts: np.ndarray, drawing: Drawing | None, end_class: int) -> None:
    """Have all tokens that end a text count as one, in place.

    None of them says more than another. So they are one token, which has the weight of
    all and is written as the best of them: or a model that has not been taught which
    one stands behind a text's end would be unsure there, and its canvas would go on.

    Args:
        parts: [n, K, 5], as in `Problem`.
        drawing: of the same positions.
    """
    ends = parts[:, end_class]
    with np.errstate(divide="ignore"):
        ends[:, BEST] += np.log(ends[:, TOTAL])
    ends[:, TOTAL], ends[:, SPREAD], ends[:, SECOND] = 1.0, 0.0, -np.inf
    if drawing is not None:
        _, _, tokens, logits = drawing
        tokens[:, end_class], logits[:, end_class] = ends[:, TOKEN], ends[:, BEST]


def give_out(steps: list[Step], choice: Choice) -> None:
    """Give the steps' rows the tokens and statistics of what was found.

    Args:
        choice: of the step's rows.
    """
    rows, tokens, numbers, lost = [], [], [], []
    best_rows, best = [], []
    for step in steps:
        read, own = step.read, step.rows_read
        if step.solved is None:
            lost.append(own)
            continue
        problem, found = step.solved
        rows.append(own)
        # What nothing can take the place of stays, with confidence 0.
        written = step.text.output[step.begin :][: len(read)]
        tokens.append(np.where(found.tokens < 0, written, found.tokens)[read])
        numbers.append(
            np.stack([found.confidence, found.entropy, found.margin])[:, read]
        )
        if problem.also_best:
            best_rows.append(own)
            best.append(np.where(found.best < 0, written, found.best)[read])
    device = choice.candidate.device
    if rows:
        at, candidate, bits = upload(
            device,
            np.concatenate(rows),
            np.concatenate(tokens),
            np.concatenate(numbers, axis=1).view(np.int64),
        )
        values = bits.view(torch.float64).float()
        choice.candidate.index_copy_(0, at, candidate)
        for column, value in zip(
            (choice.confidence, choice.entropy, choice.margin), values, strict=True
        ):
            column.index_copy_(0, at, value)
    if best:
        at, token = upload(device, np.concatenate(best_rows), np.concatenate(best))
        choice.best.index_copy_(0, at, token)
    if lost:
        # The model leaves no token of any path: the request ends with an error.
        (at,) = upload(device, np.concatenate(lost))
        choice.logsumexp.index_fill_(0, at, -torch.inf)


def _to_host(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """Tensors of float64 in host memory: the one wait of a step."""
    sizes = [len(tensor) for tensor in tensors]
    arrived = ToHost(torch.cat(tensors)).numpy()
    return np.split(arrived, np.cumsum(sizes)[:-1])
