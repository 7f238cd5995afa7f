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

A path covers the positions of the active block, as far as the text may reach. Right of
it a text must still be possible (`Completions`): in the tokens that are left, or at
once, where the canvas was cut inside the block. Positions behind the last one whose row
is read are not weighed, only possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.constraints.paths import (
    BEST,
    OPEN,
    TOTAL,
    Completions,
    Drawing,
    Problem,
    Solution,
    classes_of,
    feasible,
    possible,
    rehearse,
    solve,
    unread,
    walk,
)
from vllm_dlm.kernels.class_stats import TokenClasses, class_draws, class_stats
from vllm_dlm.kernels.draw import tempered
from vllm_dlm.kernels.numba_rows import in_threads
from vllm_dlm.kernels.shards import logit_of
from vllm_dlm.model_executor.host_slots import ToHost
from vllm_dlm.model_executor.patterns import pattern_of
from vllm_dlm.model_executor.planning.block_rows import CANVAS_END, upload
from vllm_dlm.model_executor.sampling.restrictions import known_ids
from vllm_dlm.strategies.probabilities import Probabilities, RowLogits

if TYPE_CHECKING:
    from vllm_dlm.constraints.automaton import Automaton
    from vllm_dlm.model_executor.facts import EngineFacts, RequestFacts
    from vllm_dlm.model_executor.patterns import Pattern
    from vllm_dlm.model_executor.planning.block_rows import BlockRows
    from vllm_dlm.model_executor.planning.step_plan import SegmentPlan
    from vllm_dlm.model_executor.sampling.choice import Choice
    from vllm_dlm.model_executor.sampling.logits import Logits
    from vllm_dlm.model_executor.slots import RequestSlots

CUT = -1e4
"""Added to the score of a token that top-k, top-p or min-p cut: it is drawn only where
no path does without."""


@dataclass
class _Text:
    """The text of one request."""

    slot: int
    request: RequestFacts
    pattern: Pattern
    completions: Completions
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
    def truncates(self) -> bool:
        params = self.request.params
        return self.draws and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


@dataclass
class _Step:
    """What a request's active block is in this step."""

    text: _Text
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
    rows: list[slice] = field(default_factory=list)
    """Rows of logits that were measured for it, tile by tile."""
    measured: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """What was measured of them; see `_measure`."""
    solved: tuple[np.ndarray, np.ndarray] | None = None
    """`Problem.parts` and `Solution.classes`; None where no path was found."""

    @property
    def read(self) -> np.ndarray:
        """[n] bool: open positions whose logits are read."""
        is_read: np.ndarray = (self.fixed == OPEN) & (self.row_at >= 0)
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


class Constrained:
    """The requests with a pattern; see the module docstring."""

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self._slots = slots
        self._facts = facts
        self._texts: dict[int, _Text] = {}
        self._steps: list[_Step] = []
        self._arriving: list[tuple[np.ndarray, np.ndarray, ToHost]] = []
        """Of steps that are over: slots [n], first output positions [n], and what their
        blocks hold, [n, W]."""

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
            self._facts.mask_id,
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
        self._texts[slot] = _Text(
            slot=slot,
            request=request,
            pattern=pattern,
            completions=Completions(
                automaton, pattern.graph, length, request.min_tokens, pins
            ),
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

    def prepare(self, plan: SegmentPlan) -> None:
        """Find out what stands in the active blocks of a forward."""
        self._steps = []
        if not self._texts:
            return
        self._settle()
        for rows in plan.groups:
            for row, slot in enumerate(rows.slots_np.tolist()):
                if slot in self._texts:
                    step = self._step(self._texts[slot], rows, row)
                    if step is not None:
                        self._steps.append(step)

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
                step.measured.append(
                    self._measure(step, own, values[part], logits, choice.part(part))
                )

    def choose(self, choice: Choice) -> None:
        """Give the rows of such requests their candidates and statistics.

        Args:
            choice: of the step's rows.
        """
        steps = [step for step in self._steps if step.measured]
        if not steps:
            return
        problems = _problems(steps)
        solutions: list[Solution | None] = [None] * len(problems)

        def work(first: int, last: int) -> None:
            for number in range(first, last):
                solutions[number] = solve(problems[number])

        pairs = sum(len(one.graph.klass) * len(one.fixed) for one in problems)
        in_threads(work, len(problems), 16 * pairs)
        rows, tokens, numbers, lost = [], [], [], []
        for step, problem, found in zip(steps, problems, solutions, strict=True):
            assert found is not None
            read = step.read
            if not found.found:
                lost.append(step.row_at[read])
                continue
            step.solved = problem.parts, found.classes
            rows.append(step.row_at[read])
            tokens.append(found.tokens[read])
            numbers.append(
                np.stack([found.confidence, found.entropy, found.margin])[:, read]
            )
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
        if lost:
            # The model leaves no token of any path: the request ends with an error.
            (at,) = upload(device, np.concatenate(lost))
            choice.logsumexp.index_fill_(0, at, -torch.inf)

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
            read = _Posterior(logits, steps)
            (own,) = upload(logits.device, np.concatenate([s.rows_read for s in steps]))
            # Logs of a posterior are what they are.
            logsumexp = logsumexp.index_fill(0, own, 0.0)
        return Probabilities(read, logsumexp, rows.row_at_np)

    def after_step(self) -> None:
        """Have what the step wrote sent to the host, behind its outcome."""
        if not self._steps:
            return
        slots = np.array([step.text.slot for step in self._steps])
        starts = np.array([step.block_start for step in self._steps])
        width = int(self._slots.host.window[slots].max())
        at, first = upload(self._slots.device, slots, starts)
        places = torch.arange(width, device=first.device)
        places = (first[:, None] + places).clamp(max=self._slots.length - 1)
        written = ToHost(self._slots.tokens[at[:, None], places])
        self._arriving.append((slots, starts, written))

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
                own = block[max(-first, 0) :]
                first = max(first, 0)
                own = own[: max(len(text.output) - first, 0)]
                text.output[first : first + len(own)] = own
        self._arriving.clear()

    def _step(self, text: _Text, rows: BlockRows, row: int) -> _Step | None:
        """A request's active block; None where nothing of the text lies in it.

        Args:
            row: of the group's requests.
        """
        host, layout = self._slots.host, text.request.layout
        prompt_len, limit = layout.prompt_len, len(text.output)
        block_start = int(host.block_start[text.slot])
        width = int(rows.valid_np[row].sum())
        begin = max(block_start - prompt_len, 0)
        end = min(block_start + width - prompt_len, limit)
        if begin >= end:
            return None
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
        row_at = rows.row_at_np[row, own]
        canvas_end = int(rows.packed_np[row, CANVAS_END]) - prompt_len
        block_end = block_start + int(host.block_length[text.slot]) - prompt_len
        if canvas_end < min(block_end, layout.text_end - prompt_len, limit):
            behind = text.automaton.accepting
        else:
            behind = text.completions.at(end)
        (read,) = (masked & (row_at >= 0)).nonzero()
        count = int(read[-1]) + 1 if len(read) else 0
        if not count:
            return None
        behind = possible(
            text.automaton,
            text.pattern.graph,
            fixed[count:],
            text.request.min_tokens - begin - count,
            behind,
        )
        return _Step(text, block_start, begin, fixed[:count], row_at[:count], behind)

    def _measure(
        self,
        step: _Step,
        own: slice,
        values: torch.Tensor,
        logits: Logits,
        choice: Choice,
    ) -> dict[str, torch.Tensor]:
        """What paths need of some rows of a request: [n, ...] each, float64.

        Args:
            own: which rows of `logits` they are.
            values: [n, V]: this rank's part.
            choice: of these rows, each with its argmax.
        """
        text, shard = step.text, logits.shard
        params, request = text.request.params, text.request
        whole = text.truncates
        if whole:
            at = torch.arange(own.start, own.stop, device=logits.device)
            values = logits.whole(values.clone(), at)
            shard = None
        classes = text.pattern.classes(logits.device, shard)
        if text.bias is not None:
            ids, bias = text.bias
            values = values.to(torch.float32, copy=True)
            first, size = (
                (0, values.shape[1]) if shard is None else (shard.first, shard.size)
            )
            is_here = ((ids >= first) & (ids < first + size)).float()
            columns = (ids - first).clamp(0, max(values.shape[1] - 1, 0))
            if values.shape[1]:
                values.index_add_(1, columns, (bias * is_here).expand(len(values), -1))
        found = {"parts": class_stats(values, classes, shard=shard)}
        if not text.draws:
            return found
        temperature = params.temperature
        count = len(values)
        offset = {int(row): i for i, row in enumerate(step.row_at) if row >= 0}
        (positions,) = upload(
            logits.device,
            step.begin
            + request.layout.prompt_len
            + np.array([offset.get(r, 0) for r in range(own.start, own.stop)]),
        )
        host = self._slots.host
        noise = (
            torch.full_like(positions, request.seed),
            positions,
            torch.full_like(positions, int(host.step[text.slot])),
        )
        if text.truncates:
            scores = self._truncated(step, own, values, classes)
            ones = torch.ones(count, device=logits.device)
            weights = class_stats(scores, classes)
            drawn, tokens, logit = class_draws(
                scores, classes, torch.zeros_like(ones), ones, *noise
            )
            raw = values.gather(1, tokens).double()
        else:
            top = logit_of(values, choice.candidate, shard).float()
            top = torch.where(top.isfinite(), top, 0.0)
            weights = class_stats(values, classes, 1 / temperature, shard)
            drawn, tokens, raw = class_draws(
                values, classes, top, torch.full_like(top, temperature), *noise, shard
            )
            logit = raw / temperature
        if request.measures_drawn:
            found["parts"], raw = weights, logit
        return found | {
            "weights": weights[..., BEST] + weights[..., TOTAL].log(),
            "scores": drawn,
            "tokens": tokens.double(),
            "logits": raw,
        }

    def _truncated(
        self, step: _Step, own: slice, values: torch.Tensor, classes: TokenClasses
    ) -> torch.Tensor:
        """[n, V] float32: logits / temperature; cut tokens far below, others -inf.

        Top-k, top-p and min-p choose among the tokens of feasible classes.
        """
        params = step.text.request.params
        allowed_np = np.zeros(
            (own.stop - own.start, step.text.pattern.num_classes + 1), dtype=bool
        )
        ours = (step.row_at >= own.start) & (step.row_at < own.stop)
        allowed_np[step.row_at[ours] - own.start] = step.feasible()[ours]
        (allowed,) = upload(values.device, allowed_np)
        count, device = len(values), values.device
        taken = allowed.gather(1, classes.class_of.expand(count, -1)) != 0
        scores = values.float().masked_fill(values.isnan(), -torch.inf)
        scores = scores.masked_fill(~taken, -torch.inf)

        def column(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((count,), value, dtype=dtype, device=device)

        top = scores.amax(dim=1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        kept = tempered(
            scores,
            column(params.temperature),
            column(min(max(params.top_k, 0), self._facts.vocab_size), torch.int64),
            column(params.top_p),
            column(params.min_p),
        )
        cut = (scores - top) / params.temperature + CUT
        return torch.where(kept > -torch.inf, kept, cut)


class _Posterior:
    """Logits of a step's rows; of requests with a pattern, logs of the posterior.

    Args:
        logits: the model's.
        steps: of these requests.
    """

    def __init__(self, logits: Logits, steps: list[_Step]) -> None:
        self._logits = logits
        self._steps = steps

    def over(self, rows: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """As `Logits.over`."""
        device = rows.device
        for part, logits in self._logits.over(rows):
            wanted = rows[part]
            logits = logits.double()
            for step in self._steps:
                own, bits = upload(device, step.rows_read, _shares(step).view(np.int64))
                at = torch.searchsorted(own, wanted).clamp(max=len(own) - 1)
                is_own = (own[at] == wanted)[:, None]
                class_of = step.text.pattern.classes(device).class_of
                shares = bits.view(torch.float64)[at][:, class_of]
                raw = logits
                if step.text.bias is not None:
                    ids, bias = step.text.bias
                    raw = raw.index_add(
                        1, ids, bias.double().expand(len(raw), -1).contiguous()
                    )
                logits = torch.where(is_own, raw + shares, logits)
            yield part, logits


def _shares(step: _Step) -> np.ndarray:
    """[read rows, K + 1] float64: what logits lack to be logs of the posterior.

    By the token's class; -inf for what no path takes.
    """
    assert step.solved is not None
    parts, posterior = (numbers[step.read] for numbers in step.solved)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.log(posterior) - parts[..., BEST] - np.log(parts[..., TOTAL])
    shares[posterior <= 0] = -np.inf
    return np.pad(shares, ((0, 0), (0, 1)), constant_values=-np.inf)


def _problems(steps: list[_Step]) -> list[Problem]:
    """What the steps' paths are looked for in, once the device has measured it."""
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
            zeros = np.zeros((count, num_classes))
            drawing = Drawing(
                placed(zeros.copy()),
                placed(zeros.copy()),
                placed(zeros.copy()),
                placed(zeros.copy()),
            )
        early, end_class = step.early, text.automaton.end_class
        parts[early, end_class, BEST] = -np.inf
        if drawing is not None:
            drawing.weights[early, end_class] = -np.inf
        problems.append(
            Problem(
                text.pattern.graph, text.state, step.end, step.fixed, parts, drawing
            )
        )
    return problems


def _to_host(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """Tensors of float64 in host memory: the one wait of a step."""
    sizes = [len(tensor) for tensor in tensors]
    arrived = ToHost(torch.cat(tensors)).numpy()
    return np.split(arrived, np.cumsum(sizes)[:-1])
