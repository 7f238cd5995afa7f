# SPDX-License-Identifier: Apache-2.0
"""Constrained: candidates of requests whose text must match a pattern.

The candidates of all open positions of such a request are one path through the
pattern's automaton (`constraints/paths.py`), so that whatever a strategy writes of them
leaves a completion. In a step:

    before the rows are measured   what stands in the blocks, from the step before
    of each tile of logits         numbers by class of tokens (`kernels/class_stats.py`)
    once all rows are measured     the paths, on the host; `Choice` gets them

Paths take the host, so that a step with such a request waits for the device, once. A
step without one does nothing here.

Of positions that are decided, where a strategy reads them, the candidate is the best
token that leaves the states of the path as they are: edits to it, and whatever is
written of the path, go together.

Where a strategy sets the temperature itself, all that it reads is measured at that one,
and what it is fed follows from the paths as well (`constrained_scheduled.py`).

Of a request with branches (`planning/branches.py`), each branch has a path of its own,
with its drafts in their places.

A path covers the positions of the active block, as far as the text may reach. Right of
it a text must still be possible (`Completions`): in the tokens that are left, or at
once, where the canvas was cut inside the block. Positions behind the last one whose row
is read are not weighed, only possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.constraints.paths import (
    OPEN,
    Completions,
    Solution,
    classes_of,
    possible,
    rehearse,
    solve,
    walk,
)
from vllm_dlm.kernels.class_stats import TokenClasses, class_draws, class_stats
from vllm_dlm.kernels.numba_rows import in_threads
from vllm_dlm.model_executor.constrained_rows import Posterior, measure
from vllm_dlm.model_executor.constrained_scheduled import keep_means, measure_scheduled
from vllm_dlm.model_executor.constrained_text import Step, Text, give_out, problems_of
from vllm_dlm.model_executor.host_slots import ToHost
from vllm_dlm.model_executor.patterns import pattern_of
from vllm_dlm.model_executor.planning.block_rows import CANVAS_END, upload
from vllm_dlm.model_executor.sampling.restrictions import known_ids
from vllm_dlm.strategies.base import NOT_DRAFTED
from vllm_dlm.strategies.probabilities import Probabilities, RowLogits

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.planning.branches import BranchBlocks
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.sampling.logits import Head, Logits
    from vllm_dlm.model_executor.sampling.scheduled import Scheduled
    from vllm_dlm.model_executor.slots import RequestSlots


class Constrained:
    """The requests with a pattern; see the module docstring."""

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self._slots = slots
        self._facts = facts
        self._texts: dict[int, Text] = {}
        self._steps: list[Step] = []
        self._arriving: list[tuple[np.ndarray, np.ndarray, ToHost]] = []
        """Of steps that are over: slots [n], first positions [n], and what their blocks
        hold, [n, 1, W], or [n, 3, W] with drafts and their ranks."""

    # -- requests ----------------------------------------------------------

    def add(self, slot: int, known: Sequence[int]) -> None:
        """Take over a new request, if it has a pattern.

        Args:
            known: tokens of its prompt and output so far.
        """
        request = self._slots.requests[slot]
        if request.pattern is None:
            return
        params, prompt_len = request.params, request.layout.prompt_len
        pattern = pattern_of(
            self._facts.model_config,
            request.pattern,
            params,
            request.stop_ids,
            self._facts.defaults.no_text,
        )
        canvas, automaton = request.layout.canvas, pattern.automaton
        length = params.max_tokens if canvas is None else canvas.max_tokens
        tokens = np.full(length, self._facts.mask_id, dtype=np.int64)
        pins = None
        if canvas is not None:
            tokens[:] = canvas.tokens[:length]
            pins = np.where(
                canvas.is_hole[:length], OPEN, classes_of(automaton, tokens)
            )
        emitted = np.asarray(known[prompt_len:], dtype=np.int64)[:length]
        tokens[: len(emitted)] = emitted
        bias = None
        if params.logit_bias:
            ids = known_ids(params.logit_bias, self._facts.vocab_size)
            bias = (
                torch.tensor(ids, device=self._facts.device),
                torch.tensor(
                    [params.logit_bias[token] for token in ids],
                    device=self._facts.device,
                ),
            )
        self._texts[slot] = Text(
            slot=slot,
            request=request,
            pattern=pattern,
            completions=Completions(
                automaton, pattern.graph, length, request.min_tokens, pins
            ),
            draft_tokens=np.zeros(length, dtype=np.int64),
            draft_rank=np.full(length, NOT_DRAFTED, dtype=np.int64),
            output=tokens,
            state=automaton.start,
            state_at=0,
            bias=bias,
        )

    def remove(self, slot: int) -> None:
        """Forget a request that has left."""
        if self._texts.pop(slot, None) is not None:
            # What is on its way for this slot is of this request.
            self._settle()

    def rehearse(self, logits: torch.Tensor) -> None:
        """Do once what a step does, while vLLM measures what that takes.

        Args:
            logits: [n, V], of any rows.
        """
        rehearse()
        count, vocab_size = logits.shape
        classes = TokenClasses.of(np.zeros(vocab_size, np.int64), 1, logits.device)
        rows = torch.arange(count, device=logits.device)
        class_stats(logits, classes)
        class_draws(
            logits, classes, rows.float() * 0, rows.float() * 0 + 1, rows, rows, rows
        )

    # -- one step ----------------------------------------------------------

    def prepare(self, plan: SegmentPlan, scheduled: Mapping[int, Scheduled]) -> None:
        """Find out what stands in the active blocks of a forward.

        Args:
            scheduled: blocks whose strategy sets the temperature, by their first row.
        """
        self._steps = []
        if not self._texts:
            return
        self._settle()
        for rows in plan.groups:
            for row, slot in enumerate(rows.slots_np.tolist()):
                if slot in self._texts:
                    own = scheduled.get(rows.first_row)
                    self._add_step(self._texts[slot], rows, row, own)
            if rows.branches is not None:
                self._add_branches(rows.branches)

    def measure(
        self, rows: slice, values: torch.Tensor, logits: Logits, choice: Choice
    ) -> None:
        """Measure the rows of a tile that are such requests'.

        Args:
            rows: which rows of `logits` the tile has.
            values: [n, V]: this rank's part of their logits.
            choice: of the tile's rows, each with its argmax.
        """
        for step in self._steps:
            wanted = step.row_at[step.read]
            wanted = wanted[(wanted >= rows.start) & (wanted < rows.stop)]
            if len(wanted):
                # They follow each other, but for rows of what is written.
                own = slice(int(wanted[0]), int(wanted[-1]) + 1)
                part = slice(own.start - rows.start, own.stop - rows.start)
                step.rows.append(own)
                if step.scheduled is not None:
                    found = measure_scheduled(step, own, values[part], logits)
                else:
                    found = measure(step, own, values[part], logits, choice.part(part))
                step.measured.append(found)

    def has(self, rows: slice) -> np.ndarray:
        """[n] bool: rows of the step's logits that a pattern says something of."""
        found = np.zeros(rows.stop - rows.start, dtype=bool)
        for step in self._steps:
            own = step.rows_read
            found[own[(own >= rows.start) & (own < rows.stop)] - rows.start] = True
        return found

    def choose(self, choice: Choice) -> None:
        """Give the rows of such requests their candidates and statistics.

        Args:
            choice: of the step's rows.
        """
        steps = [step for step in self._steps if step.measured]
        if not steps:
            return
        problems = problems_of(steps)
        solutions: list[Solution | None] = [None] * len(problems)

        def work(first: int, last: int) -> None:
            for number in range(first, last):
                solutions[number] = solve(problems[number])

        pairs = sum(len(one.graph.klass) * len(one.fixed) for one in problems)
        in_threads(work, len(problems), 16 * pairs)
        for step, problem, found in zip(steps, problems, solutions, strict=True):
            if found is not None and found.found:
                step.solved = problem, found
        give_out(steps, choice)

    def keep_means(self, logits: Logits, head: Head) -> None:
        """Keep what such requests are fed next: means that their patterns allow.

        Args:
            logits: of the step's rows.
        """
        for step in self._steps:
            keep_means(step, logits, head)

    def probabilities(
        self, logits: Logits, logsumexp: torch.Tensor, rows: BlockRows
    ) -> Probabilities:
        """Probabilities of any token at the positions of a group.

        Of requests with a pattern, those of the posterior.

        Args:
            logits: of the step's rows.
            logsumexp: [N] float64, of these.
        """
        slots = {*rows.slots_np.tolist()}
        steps = [s for s in self._steps if s.text.slot in slots and s.solved]
        read: RowLogits = logits
        if steps:
            read = Posterior(logits, steps)
            (own,) = upload(logits.device, np.concatenate([s.rows_read for s in steps]))
            # Logs of a posterior are what they are.
            logsumexp = logsumexp.index_fill(0, own, 0.0)
        return Probabilities(read, logsumexp, rows.row_at_np)

    def after_step(self) -> None:
        """Have what the step wrote sent to the host, behind its outcome."""
        if not self._steps:
            return
        # Once each: branches have steps of their own.
        blocks = {step.text.slot: step.block_start for step in self._steps}
        slots, starts = np.array([*blocks]), np.array([*blocks.values()])
        width = int(self._slots.host.window[slots].max())
        at, first = upload(self._slots.device, slots, starts)
        places = torch.arange(width, device=first.device)
        places = (first[:, None] + places).clamp(max=self._slots.length - 1)
        parts = [self._slots.tokens[at[:, None], places]]
        if any(step.text.has_branches for step in self._steps):
            parts += self._slots.drafts.at(at[:, None], places)
        self._arriving.append((slots, starts, ToHost(torch.stack(parts, dim=1))))

    # -- parts -------------------------------------------------------------

    def _settle(self) -> None:
        """Take over what steps have written."""
        for slots, starts, written in self._arriving:
            blocks = written.numpy()
            for slot, start, block in zip(
                slots.tolist(), starts.tolist(), blocks, strict=True
            ):
                text = self._texts.get(slot)
                if text is None:
                    continue
                first = start - text.request.layout.prompt_len
                own = block[:, max(-first, 0) :]
                first = max(first, 0)
                own = own[:, : max(len(text.output) - first, 0)]
                there = slice(first, first + own.shape[1])
                text.output[there] = own[0]
                if text.has_branches:
                    text.draft_tokens[there], text.draft_rank[there] = own[1:]
        self._arriving.clear()

    def _add_branches(self, branches: BranchBlocks) -> None:
        """The canvases with drafts: each has a path of its own."""
        slots, last, number = branches.rows.slots_np.tolist(), -1, 0
        for row, slot in enumerate(slots):
            number = number + 1 if slot == last else 1
            last = slot
            if slot in self._texts:
                self._add_step(self._texts[slot], branches.rows, row, None, number)

    def _add_step(
        self,
        text: Text,
        rows: BlockRows,
        row: int,
        scheduled: Scheduled | None,
        branch: int = 0,
    ) -> None:
        """Add a request's active block, if something of the text lies in it.

        Args:
            row: of the group's requests, or branches.
            branch: the number of the branch; 0 for the canvas itself.
        """
        host, layout = self._slots.host, text.request.layout
        prompt_len, limit = layout.prompt_len, len(text.output)
        block_start = int(host.block_start[text.slot])
        width = int(rows.valid_np[row].sum())
        begin = max(block_start - prompt_len, 0)
        end = min(block_start + width - prompt_len, limit)
        if begin >= end:
            return
        # All left of the block is written.
        if begin > text.state_at:
            left = text.output[text.state_at : begin]
            text.state = walk(text.automaton, text.state, left)
            text.state_at = begin
        own = slice(begin + prompt_len - block_start, end + prompt_len - block_start)
        masked = host.masked[text.slot, own]
        classes = classes_of(text.automaton, text.output[begin:end])
        fixed = np.where(masked, OPEN, classes)
        if text.state < 0 or (fixed[~masked] < 0).any():
            # Something outside of the pattern was written; no path follows from it.
            text.state = -1
        noise = int(host.step[text.slot])
        if text.has_branches:
            noise = int((~masked).sum()) + branch
        if branch:
            rank = text.draft_rank[begin:end]
            taken = np.where(rank < 0, rank == -branch, rank < branch) & masked
            drafts = classes_of(text.automaton, text.draft_tokens[begin:end])
            # Drafts are of a path, which the canvas has gone along.
            fixed = np.where(taken, drafts, fixed)
        row_at = rows.row_at_np[row, own]
        canvas_end = int(rows.packed_np[row, CANVAS_END]) - prompt_len
        block_end = block_start + int(host.block_length[text.slot]) - prompt_len
        if canvas_end < min(block_end, layout.text_end - prompt_len, limit):
            behind = text.automaton.accepting
        else:
            behind = text.completions.at(end)
        # Decided positions have rows where the strategy reads what the model thinks of
        # them now.
        (read,) = (row_at >= 0).nonzero()
        count = int(read[-1]) + 1 if len(read) else 0
        if not count:
            return
        behind = possible(
            text.automaton,
            text.pattern.graph,
            fixed[count:],
            text.request.min_tokens - begin - count,
            behind,
        )
        fixed, row_at = fixed[:count], row_at[:count]
        self._steps.append(
            Step(text, block_start, begin, fixed, row_at, behind, noise, row, scheduled)
        )
