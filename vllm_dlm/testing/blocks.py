# SPDX-License-Identifier: Apache-2.0
"""RandomBlocks: blocks that a strategy decodes, with statistics drawn at random.

Each row is a request. Rows begin their blocks at different times, so that a view has
all of a block's steps side by side, with what the strategy remembers of the steps
before. Among the blocks are short ones, some that share the prompt's last tokens, some
in sub-blocks, and some that begin with tokens in them. Statistics are random, equal to
others of the row, 0, 1, or exactly what a parameter of the row says. There is no NaN
among them, because the engine lets none through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_dlm.strategies.base import (
    NOT_DRAFTED,
    Branches,
    Decision,
    EditTokens,
    Params,
    Strategy,
    View,
    best_of,
    in_branch,
)
from vllm_dlm.strategies.probabilities import Probabilities

VOCAB = 40
MASK_ID = VOCAB - 1
FIRST_TEXT = 2
"""Tokens below it end the text."""
EDIT_TOKENS = EditTokens(delete=2, insert=3)
LONGEST_OUTPUT = 8
"""In blocks."""


class WholeLogits:
    """Logits [N, V] that exist, as `Probabilities` reads them."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def over(self, rows: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        """All of them at a time."""
        return [(slice(None), self.logits[rows])] if len(rows) else []


@dataclass
class Canvases:
    """R blocks as they stand."""

    first: torch.Tensor
    """[R] int64: index of each block's first position in the output; negative where
    the block begins with tokens of the prompt."""
    length: torch.Tensor
    """[R] int64: positions that exist."""
    sub_block: torch.Tensor
    """[R] int64: length of a sub-block."""
    step: torch.Tensor
    """[R] int64."""
    steps: torch.Tensor
    """[R] int64: of the step schedule."""
    tokens: torch.Tensor
    """[R, B] int64: what is, or would be, written."""
    masks: torch.Tensor
    """[R, B] bool."""
    draft_tokens: torch.Tensor
    """[R, B] int64."""
    draft_rank: torch.Tensor
    """[R, B] int64."""
    memory: dict[str, torch.Tensor]
    """name of `Strategy.state` -> [R, ...]."""

    def with_rows(self, other: Canvases, rows: torch.Tensor) -> Canvases:
        """With the rows [R] bool of others."""

        def merged(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, dict):
                return {name: merged(one, theirs[name]) for name, one in mine.items()}
            flags = rows.view(-1, *[1] * (mine.dim() - 1))
            return torch.where(flags, theirs, mine)

        pairs = {name: (one, getattr(other, name)) for name, one in vars(self).items()}
        return Canvases(**{name: merged(*pair) for name, pair in pairs.items()})


class RandomBlocks:
    """Blocks on their way; see the module docstring.

    Args:
        strategy: decides them.
        params: of each row.
        numbers: the rows' numeric parameters, name -> [R].
        seed: of everything random.
    """

    def __init__(
        self,
        strategy: Strategy,
        params: Sequence[Params],
        numbers: Mapping[str, torch.Tensor],
        seed: int,
    ) -> None:
        self.strategy = strategy
        self.rows, self.width = len(params), strategy.block_length
        self._generator = torch.Generator().manual_seed(seed)
        self._offsets = torch.arange(self.width)
        self._limits = torch.tensor([strategy.step_limit(one) for one in params])
        floats = [n for n in numbers.values() if n.is_floating_point()]
        self._exact = torch.stack(floats) if floats else None
        """[P, R] float32: parameters that statistics may be equal to."""
        self._branches = max(type(strategy).branches(one) for one in params)
        self._now = self._begun()

    # -- chance ------------------------------------------------------------

    def _chance(self, *shape: int) -> torch.Tensor:
        """float32 in [0, 1)."""
        return torch.rand(*shape, generator=self._generator)

    def _whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 from `low` to `high`, both included."""
        return torch.randint(low, high + 1, shape, generator=self._generator)

    # -- blocks ------------------------------------------------------------

    def _begun(self) -> Canvases:
        """Blocks before their first step."""
        rows, width = self.rows, self.width
        # The prompt ends in some blocks; some end before the others.
        tail = self._whole(0, width - 1, rows) * (self._chance(rows) < 0.25)
        first = self._whole(0, LONGEST_OUTPUT - 1, rows) * width
        shorter = (tail + 1 + self._whole(0, width - 1, rows)).clamp(max=width)
        length = torch.where(self._chance(rows) < 0.3, shorter, width)
        sub_block = self._whole(1, width, rows)
        writable = (self._offsets >= tail[:, None]) & (self._offsets < length[:, None])
        # Some have tokens already.
        is_empty = (self._chance(rows) < 0.6)[:, None]
        masks = writable & (is_empty | (self._chance(rows, width) < 0.6))
        masks |= best_of(writable & ~masks.any(dim=1)[:, None], masks.float())
        return Canvases(
            first=torch.where(tail > 0, -tail, first),
            length=length,
            sub_block=torch.where(self._chance(rows) < 0.3, sub_block, width),
            step=torch.zeros(rows, dtype=torch.int64),
            steps=self._whole(1, width, rows),
            tokens=self._whole(0, MASK_ID - 1, rows, width),
            masks=masks,
            draft_tokens=torch.zeros(rows, width, dtype=torch.int64),
            draft_rank=torch.full((rows, width), NOT_DRAFTED),
            memory={
                name: torch.full((rows, *one.shape), one.fill, dtype=one.dtype)
                for name, one in self.strategy.state.items()
            },
        )

    # -- what a strategy sees ----------------------------------------------

    def view(self) -> View:
        """The next step's view."""
        rows, width, needs = self.rows, self.width, self.strategy.needs
        valid = self._offsets < self._now.length[:, None]
        positions = self._now.first[:, None] + self._offsets
        decided = valid & ~self._now.masks & (positions >= 0)
        part = self._offsets // self._now.sub_block[:, None]
        first_part = torch.where(self._now.masks, part, width).amin(dim=1, keepdim=True)
        masked = self._now.masks & (part == first_part)
        # A block that opens with its first token alone.
        opens = (self._now.step == 0) & (self._chance(rows) < 0.2)
        leftmost = best_of(masked, -self._offsets.expand(rows, width).float())
        masked = torch.where(opens[:, None], leftmost, masked)

        reads_block = self.strategy.logit_rows == "block"
        read = valid if reads_block else masked
        tokens = torch.where(self._now.masks, MASK_ID, self._now.tokens)
        candidate = self._whole(0, MASK_ID - 1, rows, width)
        confidence = self._statistic(1.0) ** 0.25
        confidence = self._equal_to_parameters(confidence, 1.0)
        entropy = self._equal_to_parameters(self._statistic(3.0), 3.0)
        margin = torch.minimum(
            confidence, self._equal_to_parameters(self._statistic(1.0), 1.0)
        )
        probabilities = None
        if "probabilities" in needs:
            probabilities, best = self._probabilities(read)
            candidate, confidence = best.indices[..., 0], best.values[..., 0]
            margin = confidence - best.values[..., 1]
        # The model mostly thinks of a token what it thought when it was written.
        agrees = decided & (self._chance(rows, width) < 0.7)
        if probabilities is None:
            candidate = torch.where(agrees, tokens, candidate)
        candidate = torch.where(read, candidate, tokens)
        written = positions[:, 0].clamp(min=0) + decided.sum(dim=1)
        view = View(
            tokens=tokens,
            masked=masked,
            valid=valid,
            decided=decided,
            positions=positions,
            candidate=candidate,
            confidence=torch.where(read, confidence, 0.0),
            is_eos=(candidate < FIRST_TEXT) & valid,
            step=self._now.step.clone(),
            scheduled=self._whole(1, width, rows),
            steps=self._now.steps.clone(),
            progress=written / (LONGEST_OUTPUT * width),
            state={name: value.clone() for name, value in self._now.memory.items()},
            entropy=torch.where(read, entropy, 0.0) if "entropy" in needs else None,
            margin=torch.where(read, margin, 0.0) if "margin" in needs else None,
            uniform=self._statistic(1.0) * 0.999 if "uniform" in needs else None,
            other=_besides(candidate) if "other" in needs else None,
            noise=self._whole(0, MASK_ID - 1, rows, width)
            if "noise" in needs
            else None,
            probabilities=probabilities,
        )
        if "best" in needs:
            view = self._with_best(view)
        return replace(
            view, branches=self._drafted(view) if "branches" in needs else None
        )

    def _with_best(self, view: View) -> View:
        """With the best tokens: at some masks, another one has been drawn."""
        drawn = view.masked & (self._chance(self.rows, self.width) < 0.3)
        sure = view.confidence
        return replace(
            view,
            best=torch.where(drawn, _besides(view.candidate), view.candidate),
            best_confidence=torch.where(drawn, (sure + 1) / 2, sure),
        )

    def _statistic(self, most: float) -> torch.Tensor:
        """[R, B] float32 from 0 to `most`: random, or with many equal ones, by row."""
        values = self._chance(self.rows, self.width)
        ties = (self._chance(self.rows, 1) < 0.4).expand_as(values)
        values = torch.where(ties, (values * 4).round() / 4, values) * most
        kind = self._chance(self.rows, self.width)
        values = torch.where(kind < 0.05, 0.0, values)
        return torch.where(kind > 0.95, most, values)

    def _equal_to_parameters(self, values: torch.Tensor, most: float) -> torch.Tensor:
        """The values [R, B], some of them exactly a parameter of their row."""
        if self._exact is None:
            return values
        which = self._whole(0, len(self._exact) - 1, self.rows, self.width)
        exact = self._exact.T.gather(1, which)
        usable = (exact >= 0) & (exact <= most)
        chosen = self._chance(self.rows, self.width) < 0.15
        return torch.where(usable & chosen, exact, values)

    def _probabilities(
        self, read: torch.Tensor
    ) -> tuple[Probabilities, torch.return_types.topk]:
        """Distributions at the positions [R, B] that are read; their best two."""
        rows, width = read.shape
        logits = torch.randn(rows * width, VOCAB, generator=self._generator)
        logits *= self._whole(1, 8, rows * width, 1)
        # They come to rest as the block goes on.
        calm = (self._now.step >= 2).repeat_interleave(width)[:, None]
        likely = torch.nn.functional.one_hot(self._now.tokens.flatten(), VOCAB)
        logits = torch.where(calm, logits + 30 * likely, logits)
        logits[:, MASK_ID] = -torch.inf
        all_rows = np.arange(rows * width).reshape(rows, width)
        probabilities = Probabilities(
            WholeLogits(logits),
            logits.double().logsumexp(dim=1),
            np.where(read.numpy(), all_rows, -1),
        )
        best = logits.softmax(dim=1).view(rows, width, VOCAB).topk(2, dim=2)
        return probabilities, best

    def _drafted(self, view: View) -> Branches:
        """What a forward made of the drafts of the step before."""
        rows, width, count = self.rows, self.width, self._branches
        numbers = torch.arange(count)[None, :, None]
        evaluated = torch.where(self._now.step == 0, 1, self._whole(1, count, rows))
        left = view.masked[:, None] & ~in_branch(self._now.draft_rank[:, None], numbers)
        left &= numbers < evaluated[:, None, None]
        right = self._chance(rows, count, width) < 0.8
        candidate = self._whole(0, MASK_ID - 1, rows, count, width)
        candidate = torch.where(right, self._now.draft_tokens[:, None], candidate)
        candidate[:, 0] = view.candidate
        confidence = self._chance(rows, count, width)
        confidence[:, 0] = view.confidence
        return Branches(
            tokens=self._now.draft_tokens.clone(),
            rank=self._now.draft_rank.clone(),
            masked=left,
            candidate=torch.where(left, candidate, 0),
            confidence=torch.where(left, confidence, 0.0),
        )

    # -- what it decides ---------------------------------------------------

    def go_on(self, view: View, decision: Decision) -> None:
        """Write what was decided, as the engine would, and go on to the next step."""
        now, nothing = self._now, torch.zeros_like(view.masked)
        edit = nothing if decision.edit is None else decision.edit
        remask = nothing if decision.remask is None else decision.remask
        tokens = view.candidate if decision.new_tokens is None else decision.new_tokens
        may_change = view.decided & self.strategy.may_rewrite
        edit, remask = edit & may_change, remask & may_change & ~edit
        open_ = view.masked
        if view.branches is not None:
            open_ = view.branches.masked.any(dim=1)
        commit = decision.commit & open_
        stalled = commit.sum(dim=1) <= remask.sum(dim=1)
        if decision.idle is not None:
            stalled &= ~decision.idle
        commit |= best_of(view.masked & stalled[:, None], view.confidence)
        last = (now.step + 1 >= self._limits)[:, None]
        commit = torch.where(last, now.masks, commit)
        edit, remask = edit & ~last, remask & ~last
        now.tokens = torch.where(commit | edit, tokens, now.tokens)
        now.masks = (now.masks & ~commit) | remask
        now.step = now.step + 1
        for name, value in (decision.state or {}).items():
            now.memory[name] = value.to(now.memory[name].dtype)
        if decision.draft_rank is not None and decision.draft_tokens is not None:
            now.draft_rank = torch.where(now.masks, decision.draft_rank, NOT_DRAFTED)
            now.draft_tokens = decision.draft_tokens
        held = torch.zeros(self.rows, dtype=torch.bool)
        if decision.hold is not None:
            held = decision.hold & ~last[:, 0]
        done = ~now.masks.any(dim=1) & ~held
        # Some requests end early, or are preempted.
        leaves = done | (self._chance(self.rows) < 0.02)
        self._now = now.with_rows(self._begun(), leaves)


def _besides(candidate: torch.Tensor) -> torch.Tensor:
    """A token of the text for each candidate, and another than that."""
    first = max(EDIT_TOKENS) + 1
    return first + (candidate + 1) % (MASK_ID - first)


def padded(view: View, more: int) -> View:
    """The view, behind it rows of no request, as the engine fills a batch up.

    Args:
        more: rows.
    """
    ones = {"scheduled", "steps"}

    def longer(name: str, value: object) -> object:
        if isinstance(value, torch.Tensor):
            size = (more, *value.shape[1:])
            fill = 1 if name in ones else 0
            return torch.cat([value, torch.full(size, fill, dtype=value.dtype)])
        if isinstance(value, Mapping):
            return {key: longer(key, part) for key, part in value.items()}
        if isinstance(value, Branches):
            return Branches(**{n: longer(n, part) for n, part in vars(value).items()})  # type: ignore[arg-type]
        if isinstance(value, Probabilities):
            none = np.full((more, value.rows.shape[1]), -1)
            return replace(value, rows=np.concatenate([value.rows, none]))
        return value

    return View(**{name: longer(name, value) for name, value in vars(view).items()})  # type: ignore[arg-type]
