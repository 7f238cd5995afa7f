# SPDX-License-Identifier: Apache-2.0
"""Decode with a learner as an engine would: the same strategies, in plain PyTorch.

So a training measures forwards and right answers before and after, without a server.
It does what a request's options say, or refuses them: no caches, no sampling, none of
what takes an engine. Tokens and forwards are those of an engine in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import RequestConfig, resolve
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    Context,
    Decision,
    Strategy,
    View,
    best_masked,
    numeric_fields,
)
from vllm_dlm.training.decoders import DecoderModel
from vllm_dlm.training.learner import Learner, declared

HAS = frozenset({"entropy", "margin", "other", "best"})
"""What strategies may need here."""


class Decoded(NamedTuple):
    """One answer."""

    tokens: list[int]
    """Up to and with the first end of the text."""
    forwards: int


def decode(
    learner: Learner,
    prompts: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    canvas: int,
    rows_at_once: int = 64,
) -> list[Decoded]:
    """Greedy answers to prompts.

    Args:
        learner: The network.
        prompts: Token ids.
        options: Of a request, such as {"strategy": "static", "steps_per_block": 8}.
        canvas: Positions of each answer.
        rows_at_once: Prompts that go through the network together.

    Raises:
        ValueError: options that are wrong, or that need an engine.
    """
    config, defaults = check_options(learner, options, canvas)
    decoded: list[Decoded] = []
    with _as_served(learner):
        for first in range(0, len(prompts), rows_at_once):
            some = prompts[first : first + rows_at_once]
            decoded += _Canvases(learner, some, config, defaults, canvas).run()
    return decoded


@contextmanager
def _as_served(learner: Learner) -> Iterator[None]:
    """In eval mode, and with the blocks that the learner will be saved with."""
    network = learner.network
    was_training = network.training
    block = network.attention_block if isinstance(network, DecoderModel) else None
    network.eval()
    if isinstance(network, DecoderModel):
        network.attention_block = learner.attention_block
    try:
        yield
    finally:
        network.train(was_training)
        if isinstance(network, DecoderModel):
            network.attention_block = block


def check_options(
    learner: Learner, options: Mapping[str, Any], canvas: int
) -> tuple[RequestConfig, ModelDefaults]:
    """What a request's options mean for a model, if this loop can follow them.

    Raises:
        ValueError: as `decode`.
    """
    defaults = declared(learner.source)
    if learner.attention_block is not None:
        # It may be trained for other blocks than it has come with.
        defaults = replace(defaults, block_length=learner.attention_block)
    config = resolve(DlmConfig(), {"dlm": dict(options)}, defaults)
    config = config.sized(canvas, canvas)
    strategy = _strategy(learner, config, defaults)
    _refuse_what_takes_an_engine(config, defaults, strategy)
    return config, defaults


def _strategy(
    learner: Learner, config: RequestConfig, defaults: ModelDefaults
) -> Strategy:
    """The strategy that decides.

    Raises:
        ValueError: its parameters do not fit the model or the block length.
    """
    context = Context(
        learner.device,
        str(learner.source),
        attention=defaults.attention,
        own_block=defaults.block_length,
    )
    rule = STRATEGIES[config.strategy]
    rule.validate(config.params, config.block_length, context)
    return rule(config.params, config.block_length, context)


def _refuse_what_takes_an_engine(
    config: RequestConfig, defaults: ModelDefaults, strategy: Strategy
) -> None:
    rule = STRATEGIES[config.strategy]
    lacking = strategy.needs - HAS
    spans = rule.scope == "blocks" and defaults.reuses_blocks
    problems = {
        f"the strategy {config.strategy} (it reads {', '.join(sorted(lacking))})": (
            bool(lacking)
        ),
        f"the strategy {config.strategy}": rule.verifies or spans,
        f"the strategy {config.strategy} (it feeds mixtures of tokens)": (
            rule.soft(config.params) is not None
        ),
        f"cache {config.cache}": config.cache != "none",
        f"growth {config.growth}": config.growth != "none",
        f"eotp {config.eotp}": config.eotp != "off",
        "sub_block_length": config.sub_block_length < config.block_length,
        "reference_exact": config.reference_exact,
        "tccf": config.tccf is not None,
        "a model whose blocks have leads": defaults.leads_blocks,
        "a model that edits lengths": defaults.edit_tokens is not None,
    }
    for what, is_so in problems.items():
        if is_so:
            raise ValueError(
                f"{what} takes an engine to decode: measure with vllm-dlm bench"
            )


@dataclass
class _Step:
    """The active blocks of R rows, [R, B] each, as a forward found them."""

    columns: Tensor
    tokens: Tensor
    exists: Tensor
    in_output: Tensor


class _Canvases:
    """Rows that are decoded together; none sees another."""

    def __init__(
        self,
        learner: Learner,
        prompts: Sequence[Sequence[int]],
        config: RequestConfig,
        defaults: ModelDefaults,
        canvas: int,
    ) -> None:
        self.learner, self.config, self.defaults = learner, config, defaults
        self.canvas, self.block = canvas, config.block_length
        device = learner.device
        self.starts = torch.tensor([len(each) for each in prompts], device=device)
        self.ends = self.starts + canvas
        # Where each row's active block begins.
        self.begin = self.starts.clone()
        if defaults.block_origin == "start":
            self.begin = self.starts // self.block * self.block
        # Room for the last block of every row, which may end behind the row.
        length = int(self.ends.max()) + self.block
        ids = torch.full((len(prompts), length), learner.end_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(list(prompt))
            ids[row, len(prompt) : len(prompt) + canvas] = learner.mask_id
        self.ids = ids.to(device)
        self.step = torch.zeros_like(self.starts)
        self.block_masks = torch.zeros_like(self.starts)
        self.forwards = torch.zeros_like(self.starts)
        self.strategy = _strategy(learner, config, defaults)
        self.state = {
            name: torch.full(
                (len(prompts), *each.shape), each.fill, dtype=each.dtype, device=device
            )
            for name, each in self.strategy.state.items()
        }
        stops = {learner.end_id, *defaults.stop_ids}
        self.stops = torch.tensor(sorted(stops), device=device)

    @torch.no_grad()
    def run(self) -> list[Decoded]:
        """Decode all rows to the end of their texts."""
        active = torch.arange(len(self.ids), device=self.ids.device)
        while len(active):
            active = active[~self._forward(active)]
        answers = []
        for row, start, end, forwards in zip(
            self.ids, self.starts, self.ends, self.forwards.tolist(), strict=True
        ):
            tokens = row[start:end]
            stops = torch.isin(tokens, self.stops).nonzero()
            if len(stops):
                tokens = tokens[: int(stops[0]) + 1]
            answers.append(Decoded(tokens.tolist(), forwards))
        return answers

    def _forward(self, rows: Tensor) -> Tensor:
        """One step of some rows; [R] bool: whose text is finished."""
        block = self._blocks(rows)
        view = self._view(rows, block)
        params = self.config.params
        numbers = {
            name: torch.full((len(rows),), getattr(params, name), device=rows.device)
            for name in numeric_fields(type(params))
        }
        decision = self.strategy.select(view, numbers)
        self.forwards[rows] += 1
        last = view.step + 1 >= self.strategy.step_limit(params)
        commit, edit, remask = self._held(view, decision, last)
        tokens = view.candidate
        if decision.new_tokens is not None:
            tokens = decision.new_tokens
        written = torch.where(commit | edit, tokens, block.tokens)
        written = torch.where(remask, self.learner.mask_id, written)
        # Columns behind a canvas are no row's: they keep what they had.
        self.ids[rows[:, None], block.columns] = written
        self.step[rows] += 1
        for name, value in (decision.state or {}).items():
            self.state[name][rows] = value.to(self.state[name].dtype)
        if decision.truncate_at is not None:
            cut = self.begin[rows] + decision.truncate_at + 1
            ends = self.ends[rows]
            self.ends[rows] = torch.where(decision.truncate_at >= 0, cut, ends)
        masks = (written == self.learner.mask_id) & block.in_output
        done = ~masks.any(1)
        if decision.hold is not None:
            done &= ~decision.hold | last
        self._next_blocks(rows[done])
        # What may be edited is final with its block, all else when it is written.
        is_final = torch.ones_like(done)
        if self.strategy.may_rewrite:
            is_final = done
        return (self.begin[rows] >= self.ends[rows]) | (is_final & self._has_end(rows))

    def _blocks(self, rows: Tensor) -> _Step:
        offsets = torch.arange(self.block, device=rows.device)
        columns = self.begin[rows][:, None] + offsets
        exists = columns < self.ends[rows][:, None]
        in_output = exists & (columns >= self.starts[rows][:, None])
        return _Step(columns, self.ids[rows[:, None], columns], exists, in_output)

    def _view(self, rows: Tensor, block: _Step) -> View:
        """What the strategy sees, of R rows."""
        masked = (block.tokens == self.learner.mask_id) & block.in_output
        decided = block.in_output & ~masked
        read = block.in_output if self.strategy.logit_rows == "block" else masked
        logits = self._logits(rows, block, read)
        statistics = _statistics(logits, self.strategy.needs)
        fill = {"candidate": block.tokens, "other": block.tokens}
        spread = {}
        for name, values in statistics.items():
            base = fill.get(name)
            if base is None:
                base = torch.zeros(read.shape, dtype=values.dtype, device=read.device)
            spread[name] = base.masked_scatter(read, values)
        step = self.step[rows]
        masks = masked.sum(1)
        self.block_masks[rows] = torch.where(step == 0, masks, self.block_masks[rows])
        positions = block.columns - self.starts[rows][:, None]
        budget = self._steps_per_block()
        steps = torch.full_like(step, budget)
        before = positions[:, 0].clamp(min=0)
        return View(
            tokens=block.tokens,
            masked=masked,
            valid=block.exists,
            decided=decided,
            positions=positions,
            is_eos=torch.isin(spread["candidate"], self.stops) & block.in_output,
            step=step,
            scheduled=self._scheduled(rows, masks, step, budget),
            steps=steps,
            progress=(before + decided.sum(1)) / self.canvas,
            state={name: value[rows] for name, value in self.state.items()},
            num_masks=masks,
            candidate=spread["candidate"],
            confidence=spread["confidence"],
            entropy=spread.get("entropy"),
            margin=spread.get("margin"),
            other=spread.get("other"),
            # Nothing is drawn.
            best=spread["candidate"],
            best_confidence=spread["confidence"],
        )

    def _logits(self, rows: Tensor, block: _Step, read: Tensor) -> Tensor:
        """Of the positions to read, [N, V]; a mask is never proposed."""
        where = torch.zeros_like(self.ids[rows], dtype=torch.bool)
        where[torch.arange(len(rows))[:, None], block.columns] = read
        places = torch.arange(self.ids.shape[1], device=rows.device)
        valid = places < self.ends[rows][:, None]
        logits = self.learner.logits_at(self.ids[rows], valid, where)
        logits[:, self.learner.mask_id] = -torch.inf
        return logits

    def _steps_per_block(self) -> int:
        """Of the step schedule."""
        if self.config.steps_per_block is not None:
            return min(self.config.steps_per_block, self.block)
        if self.config.steps is None:
            return self.block
        blocks = max(self.canvas // self.block, 1)
        return min(max(self.config.steps // blocks, 1), self.block)

    def _scheduled(
        self, rows: Tensor, masks: Tensor, step: Tensor, budget: int
    ) -> Tensor:
        """[R] int64: tokens that the step schedule writes now."""
        if self.defaults.schedule == "rounded":
            share = (masks.double() / (budget - step).clamp(min=1)).round().long()
        else:
            # Models that decode block after block divide the block's length.
            whole = self.block_masks[rows]
            if self.defaults.reuses_blocks:
                whole = torch.full_like(whole, self.block)
            share = whole // budget + (step < whole % budget).long()
        return torch.where(step < budget - 1, share, self.block).clamp(min=1)

    def _held(
        self, view: View, decision: Decision, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is written, edited and masked again: a decision held to the rules."""
        nothing = torch.zeros_like(view.masked)
        edit = nothing if decision.edit is None else decision.edit
        remask = nothing if decision.remask is None else decision.remask
        may_change = view.decided if self.strategy.may_rewrite else nothing
        edit = edit & may_change & ~last[:, None]
        remask = remask & may_change & ~edit & ~last[:, None]
        commit = decision.commit & view.masked
        # A step that writes nothing would be repeated for ever.
        stalled = commit.sum(1) <= remask.sum(1)
        if decision.idle is not None:
            stalled &= ~decision.idle
        commit |= best_masked(view) & stalled[:, None]
        return torch.where(last[:, None], view.masked, commit), edit, remask

    def _next_blocks(self, rows: Tensor) -> None:
        self.begin[rows] += self.block
        self.step[rows] = 0
        for name, each in self.strategy.state.items():
            self.state[name][rows] = each.fill

    def _has_end(self, rows: Tensor) -> Tensor:
        """[R] bool: an end of the text without a mask to its left."""
        places = torch.arange(self.ids.shape[1], device=rows.device)
        ids = self.ids[rows]
        inside = (places >= self.starts[rows][:, None]) & (
            places < self.ends[rows][:, None]
        )
        is_mask = inside & (ids == self.learner.mask_id)
        left = is_mask.cumsum(1) == 0
        return (inside & left & torch.isin(ids, self.stops)).any(1)


def _statistics(logits: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """What `View` has of each row of logits, [N] each."""
    probabilities = logits.softmax(-1)
    best = probabilities.topk(2, dim=-1)
    found = {"confidence": best.values[:, 0], "candidate": best.indices[:, 0]}
    # Equal probabilities: the lower token id, as everywhere.
    found["candidate"] = probabilities.argmax(-1)
    if "entropy" in needs:
        found["entropy"] = torch.special.entr(probabilities).sum(-1)
    if "margin" in needs:
        found["margin"] = best.values[:, 0] - best.values[:, 1]
    if "other" in needs:
        besides = probabilities.scatter(1, found["candidate"][:, None], -1.0)
        found["other"] = besides.argmax(-1)
    return found
