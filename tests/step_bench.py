# SPDX-License-Identifier: Apache-2.0
"""One group's step without an engine: a table of requests in random states."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dlm.config.cache import FAR, Reach
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.model_executor.columns import NEVER, number_columns
from vllm_dlm.model_executor.planning.block_rows import (
    BATCH_ROW,
    CANVAS_END,
    COLUMNS,
    HEAD_ROWS,
    LEADS,
    NOT_READ,
    NOT_READABLE,
    NOT_VALID,
    ROWS_END,
    SLOT,
    pack,
)
from vllm_dlm.model_executor.reply import Reply
from vllm_dlm.model_executor.sampling.advance import Advance
from vllm_dlm.model_executor.sampling.candidates import Candidates
from vllm_dlm.model_executor.sampling.choice import Choice
from vllm_dlm.model_executor.sampling.groups import Group
from vllm_dlm.model_executor.sampling.safety import Safety
from vllm_dlm.model_executor.sampling.soft_memory import soft_fields
from vllm_dlm.model_executor.sampling.step_function import StepFunction
from vllm_dlm.model_executor.sampling.views import Views
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Context, EditTokens

VOCAB, EOS, MASK = 40, 1, 39
CPU = torch.device("cpu")


class StepBench:
    """A strategy's step function, and a table whose requests are in random states.

    Args:
        strategy: name of the strategy.
        attention: of the model: `full`, or another kind, which decodes blocks.
        shift: of the model.
        params: of the strategy.
    """

    def __init__(
        self,
        strategy: str,
        attention: str = "full",
        shift: int = 0,
        *,
        block_length: int = 8,
        num_slots: int = 9,
        seed: int = 0,
        **params: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.block_length = block_length
        self.defaults = ModelDefaults(
            strategy=strategy,
            block_length=block_length,
            mask_token_id=MASK,
            attention=attention,  # type: ignore[arg-type]
            shift=shift,
        )
        length = 8 * block_length + 5
        self.facts: Any = SimpleNamespace(
            device=CPU,
            defaults=self.defaults,
            mask_id=MASK,
            vocab_size=VOCAB,
            is_async=False,
        )
        self.table = RequestSlots(num_slots, length, MASK, CPU)
        kind = STRATEGIES[strategy]
        context = Context(
            CPU,
            "",
            attention=attention,
            positions=4 * block_length,
            mask_id=MASK,
            edit_tokens=EditTokens(0, 1),
        )
        made = kind(kind.Params(**params), block_length, context)
        inputs = kind.soft(made.params)
        soft = soft_fields(inputs, block_length, 3, torch.float32) if inputs else {}
        self.group = Group(made, 0, soft)
        self.choice = Choice.room_for(num_slots * block_length, CPU)
        candidates = Candidates(self.table, self.facts)
        self.total_len = torch.zeros(num_slots, dtype=torch.int32)
        self.function = StepFunction(
            self.group,
            self.table,
            self.facts,
            Views(self.table, self.facts, candidates),
            Safety(self.table, self.facts, candidates),
            Advance(self.table, self.facts, self.total_len),
        )
        for slot in range(num_slots):
            self._admit(slot)
        self.group.memory = self.group._rows(num_slots + 1)

    def _admit(self, slot: int) -> None:
        """Give a slot a request in some state of its third block or before."""
        table, rand, length = self.table, self.random, self.block_length
        strategy = self.group.strategy
        prompt_len = rand.randint(1, 2 * length)
        origin = prompt_len % length
        block_start = origin + (prompt_len - origin) // length * length
        block_start += rand.randint(0, 2) * length
        text_end = block_start + rand.randint(1, 3) * length
        canvas_end = min(text_end, block_start + rand.choice([length, length - 3]))
        columns = {
            "prompt_len": prompt_len,
            "text_end": text_end,
            "block_length": length,
            "sub_block_length": rand.choice([length, length // 2]),
            "steps_per_block": rand.randint(1, length),
            "eotp": rand.randint(0, 3),
            "eotp_threshold": 0.5,
            "exact": rand.randint(0, 1),
            "opens_alone": rand.randint(0, 1) * (self.defaults.attention == "full"),
            "may_rewrite": strategy.may_rewrite,
            "step_limit": strategy.step_limit(strategy.params),
            "reference_steps": rand.choice([NEVER, rand.randint(1, length)]),
            "min_tokens": rand.choice([0, 0, 3]),
            "seed": rand.randint(0, 1000),
            "seat": slot + 1,
            "block_start": block_start,
            "canvas_end": canvas_end,
            "emitted": max(block_start - prompt_len, 0),
            "step": rand.choice([0, 1, 2, length - 1]),
            "block_masks": rand.randint(1, length),
            "frontier": block_start,
        }
        for name, value in columns.items():
            getattr(table, name)[slot] = value
        reach = Reach(*table.reach[slot].tolist())._replace(
            refresh_every=rand.choice([1, 4, FAR]), part=FAR
        )
        table.reach[slot] = torch.tensor(reach)
        table.stop_ids[slot, 0] = EOS
        for name, (is_int, column) in number_columns(strategy.Params).items():
            numbers = table.numbers if is_int else table.numbers_f
            numbers[slot, column] = getattr(strategy.params, name)
        table.tokens[slot] = MASK
        for position in range(canvas_end):
            known = position < block_start or rand.random() < 0.5
            if position < prompt_len or known:
                table.tokens[slot, position] = rand.randrange(VOCAB - 1)
            table.masked[slot, position] = not (position < prompt_len or known)
        table.masked[slot, canvas_end:] = True

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all that a step writes, of the slots that are requests'."""
        table = self.table
        return {
            "live": table.live[:-1].clone(),
            "tokens": table.tokens[:-1].clone(),
            "masked": table.masked[:-1].clone(),
            "total_len": self.total_len.clone(),
            **{name: field[1:].clone() for name, field in self.group.memory.items()},
        }

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Write a `state` back."""
        table = self.table
        table.live[:-1] = state["live"]
        table.tokens[:-1] = state["tokens"]
        table.masked[:-1] = state["masked"]
        self.total_len[:] = state["total_len"]
        for name, field in self.group.memory.items():
            field[1 : 1 + len(state[name])] = state[name]

    def measure(self) -> None:
        """Fill the rows of a step with random statistics, ties and all."""
        count = len(self.choice.candidate)
        draw = torch.Generator().manual_seed(self.random.randrange(1 << 30))

        def numbers(values: list[float]) -> torch.Tensor:
            at = torch.randint(len(values), (count,), generator=draw)
            return torch.tensor(values)[at]

        def noise() -> torch.Tensor:
            return torch.rand(count, generator=draw)

        some = numbers([0, 1]).bool()
        choice = self.choice
        tokens = torch.randint(VOCAB - 1, (count,), generator=draw)
        choice.candidate.copy_(torch.where(noise() < 0.2, EOS, tokens))
        # At thresholds, tied, certain, impossible; and anything.
        choice.confidence.copy_(
            torch.where(some, noise(), numbers([0.0, 0.5, 0.9, 0.9, 1.0]))
        )
        # Of some rows, another token than the best was drawn.
        choice.best.copy_(torch.where(noise() < 0.7, choice.candidate, tokens))
        choice.best_confidence.copy_(choice.confidence)
        choice.entropy.copy_(torch.where(some, 3 * noise(), numbers([0.0, 0.1, 1.0])))
        choice.margin.copy_(torch.where(some, noise(), numbers([0.0, 0.5, 1.0])))
        choice.logsumexp.copy_(torch.where(noise() < 0.02, -torch.inf, noise()))

    def packed(self, slots: list[int]) -> np.ndarray:
        """The plan of a step of these slots, in this order, as `pack` makes it."""
        table, length = self.table, self.block_length
        host = {name: getattr(table, name).tolist() for name in ("block_start",)}
        masked, ends = table.masked.numpy(), table.canvas_end.tolist()
        row_at = np.full((len(slots), length), NOT_VALID)
        leads, row = [], 0
        for i, slot in enumerate(slots):
            start = host["block_start"][slot]
            lead = self.defaults.leads_blocks and int(table.step[slot]) == 0
            leads.append(lead)
            for offset in range(length):
                position = start + offset
                if position >= ends[slot]:
                    continue
                row_at[i, offset] = NOT_READABLE if lead and offset else NOT_READ
                reads = masked[slot, position] or self.group.strategy.logit_rows == (
                    "block"
                )
                if reads and row_at[i, offset] == NOT_READ:
                    row_at[i, offset], row = row, row + 1
        columns = {
            SLOT: slots,
            BATCH_ROW: np.arange(len(slots)),
            CANVAS_END: [ends[slot] for slot in slots],
            ROWS_END: [ends[slot] for slot in slots],
            LEADS: leads,
            HEAD_ROWS: np.arange(len(slots)) == 0,
        }
        arrays = {column: np.array(values) for column, values in columns.items()}
        return pack(arrays, row_at, table.num_slots, len(slots))

    def run(self, step: Any, packed: np.ndarray, count: int) -> dict[str, torch.Tensor]:
        """Run a step of `count` requests; what it answers, and the state then."""
        reply = Reply.empty(count, self.block_length + 2, CPU)
        step(torch.from_numpy(packed), self.choice, reply)
        return {
            "tokens of the reply": reply.tokens[:-1],
            "counts": reply.counts[:, :-1],
            "masks": reply.masked[:-1],
            **self.state(),
        }


def alone(packed: np.ndarray, row: int, dummy_slot: int) -> np.ndarray:
    """The plan of one of the requests of a plan; its rows of logits stay the same."""
    both = packed[[row, row]].copy()
    both[0, BATCH_ROW] = 0
    both[1, SLOT], both[1, BATCH_ROW] = dummy_slot, 1
    both[1, COLUMNS:] = NOT_VALID
    return both
