# SPDX-License-Identifier: Apache-2.0
"""Candidates: which token each position would write, under the request's sampling.

Sampling parameters act on which token is drawn, never on how sure the model is of it:
the confidence a strategy sees is the candidate's probability under the model's own,
untempered distribution. (Measuring it after temperature makes threshold decoding
collapse: Gen-Verse/dLLM-RL issue 5.)

Several references measure it after temperature and top-k/p; so do we for strategies
that say so (`Strategy.measures`), and with `reference_exact` for families that do
(`ModelDefaults.reference_confidence`).

Rows of plain greedy requests cost nothing here: their candidate is the argmax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm_dlm.kernels.draw import (
    draw,
    random_tokens,
    rows_per_slice,
    tempered,
    uniform,
)
from vllm_dlm.kernels.next_best import next_best
from vllm_dlm.kernels.token_stats import prob_of, token_stats
from vllm_dlm.model_executor.columns import STOP_IDS
from vllm_dlm.model_executor.planning.block_rows import upload
from vllm_dlm.model_executor.sampling.bad_words import MASKED
from vllm_dlm.model_executor.sampling.choice import Choice, Tile
from vllm_dlm.model_executor.sampling.restrictions import Restriction, known_ids
from vllm_dlm.model_executor.sampling.stop_ids import StopIds, padded
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import given

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import BlockRows, Blocks
    from vllm_dlm.model_executor.slots import RequestSlots


class Sampling(NamedTuple):
    """What shapes the distributions that n rows draw from; every tensor is [n]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def at(self, rows: torch.Tensor) -> Sampling:
        """The parameters of some of the rows."""
        return Sampling(*(values[rows] for values in self))


class Candidates:
    """Draws candidates and knows which of them end a text."""

    def __init__(self, slots: RequestSlots, facts: EngineFacts) -> None:
        self.slots = slots
        self.facts = facts
        count = slots.num_slots

        def flags() -> np.ndarray:
            return np.zeros(count, dtype=bool)

        # On the host: which rows need more than their argmax.
        self._draws, self._truncates = flags(), flags()
        self._measures_drawn, self._leads_greedily = flags(), flags()
        self._reads_other, self._reads_best = flags(), flags()
        self._cuts = flags()
        self._restrictions: dict[int, Restriction] = {}
        self.stop_ids = StopIds(slots)
        self._restricted_until = np.zeros(count, dtype=np.int64)
        """[slots]: the position where a request's restriction ends, 0 without one."""

    def remove(self, slot: int) -> None:
        """Forget a request that has left, and its lists of tokens."""
        self._restrictions.pop(slot, None)
        self._restricted_until[slot] = 0
        self.stop_ids.remove(slot)

    def add(self, slot: int) -> None:
        """Take over a new request's sampling parameters."""
        request = self.slots.requests[slot]
        params = request.params
        vocab_size = self.facts.vocab_size
        # A text is never longer; the number may be.
        min_tokens = min(request.min_tokens, self.facts.max_model_len)
        ends = known_ids(request.stop_ids, vocab_size)
        self.slots.stage(
            slot,
            temperature=params.temperature,
            top_p=params.top_p,
            min_p=params.min_p,
            # Larger numbers than a vocabulary has tokens are valid: they keep all.
            top_k=min(max(params.top_k, 0), vocab_size),
            seed=request.seed,
            min_tokens=min_tokens,
            stop_ids=padded(ends, STOP_IDS),
        )
        self.stop_ids.add(slot, ends[STOP_IDS:])

        # Of a text that must match a pattern, all of this is `constrained.py`'s.
        is_free = request.pattern is None
        draws = params.temperature > 0 and is_free
        self._draws[slot] = draws
        self._truncates[slot] = draws and (params.top_k > 0 or params.top_p < 1)
        self._cuts[slot] = self._truncates[slot] or (draws and params.min_p > 0)
        self._measures_drawn[slot] = draws and request.measures_drawn
        needs = STRATEGIES[request.config.strategy].needs
        self._reads_other[slot] = "other" in needs
        self._reads_best[slot] = "best" in needs
        defaults = self.facts.defaults
        shifts_leads = defaults.leads_blocks and defaults.shift == 1
        exact = request.config.reference_exact
        # Fast-dLLM v2 never draws a block's lead.
        self._leads_greedily[slot] = shifts_leads and exact
        restriction = None
        if is_free:
            restriction = Restriction.of(request, vocab_size, self.facts.device)
        self._restricted_until[slot] = 0
        if restriction is not None:
            self._restrictions[slot] = restriction
            end = request.layout.prompt_len + min_tokens
            for_ever = np.iinfo(np.int64).max
            self._restricted_until[slot] = end if restriction.is_early else for_ever

    # -- drawing -----------------------------------------------------------

    def are_special(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests needs more than its rows' argmax."""
        special = self._draws | self._reads_other | self._restricts()
        return bool(special[slots_np].any())

    def read_best(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests' strategies reads the best tokens."""
        return bool(self._reads_best[slots_np].any())

    def have_bad_words(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests forbids words."""
        restricted = slots_np[self._restricts()[slots_np]].tolist()
        return any(self._restrictions[s].bad_words is not None for s in restricted)

    def draw(self, slots_np: np.ndarray) -> np.ndarray:
        """[n] bool: requests of these slots [n] that draw."""
        draws: np.ndarray = self._draws[slots_np]
        return draws

    def shapes(self, slots_np: np.ndarray) -> np.ndarray:
        """[n] bool: requests in slots [n] that restrict or truncate their rows."""
        shapes: np.ndarray = (self._restricts() | self._cuts)[slots_np]
        return shapes

    def shaped(self, tile: Tile, some: np.ndarray) -> torch.Tensor:
        """[m, V] float32: logits of rows as their requests restrict and truncate them,
        at temperature 1; of all ranks.

        Args:
            some: [m]: which rows of the tile.
        """
        rows, slots = tile.blocks, tile.slots_np[some]
        at, cut = upload(tile.values.device, some, self._cuts[slots].nonzero()[0])
        shaped = tile.logits.whole(tile.values[at], at + tile.rows.start)
        shaped = shaped.to(torch.float32, copy=True)
        if self._restricts()[slots].any():
            self._restrict(shaped, some + tile.own.start, rows)
        if len(cut):
            owners = rows.row_request[tile.own][at]
            sampling = self._sampling(rows.blocks.slots[owners]).at(cut)
            plain = torch.ones_like(sampling.temperature)
            for part in torch.arange(len(cut), device=cut.device).split(
                rows_per_slice(shaped)
            ):
                shaping = sampling._replace(temperature=plain).at(part)
                shaped[cut[part]] = tempered(shaped[cut[part]], *shaping)
        return shaped

    def choose(self, tile: Tile, choice: Choice) -> None:
        """Draw, or choose of what is allowed, where requests ask for it.

        Decided positions have the argmax as candidate.

        Args:
            choice: of the tile's rows, each with its argmax: changed in place.
        """
        slots, restricts = tile.slots_np, self._restricts()
        special = self._draws[slots] | restricts[slots]
        # Who draws from the model's own distribution needs no other rank's logits.
        shaped = (restricts | self._truncates | self._measures_drawn)[slots]
        for wanted, gathers in ((special & ~shaped, False), (special & shaped, True)):
            (some,) = wanted.nonzero()
            if len(some):
                self._redo(choice, tile, some, gathers=gathers)
        if self._reads_other[slots].any():
            self._choose_others(choice, tile)

    def _redo(
        self, choice: Choice, tile: Tile, some: np.ndarray, *, gathers: bool
    ) -> None:
        """Choose anew for rows that are drawn or restricted.

        Args:
            some: [m]: which rows of the tile.
            gathers: whether they need the logits of all ranks.
        """
        logits, rows, slots = tile.logits, tile.blocks, tile.slots_np[some]
        blocks, shard = rows.blocks, None if gathers else logits.shard

        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(logits.device, non_blocking=True)

        at = on_device(some)
        masked, raw, argmax = tile.masked[at], tile.values[at], choice.candidate[at]
        if gathers:
            raw = logits.whole(raw, at + tile.rows.start)
        processed, stuck = raw, None
        if self._restricts()[slots].any():
            # A copy, also of float32: what is restricted must not move the confidence.
            processed = raw.to(torch.float32, copy=True)
            self._restrict(processed, some + tile.own.start, rows)
            left = token_stats(processed)
            argmax = left.argmax
            # A position that is written already needs no token.
            stuck = (left.logsumexp == -torch.inf) & masked
            if self.read_best(slots):
                choice.best[at] = argmax
                sure = prob_of(raw, argmax, choice.logsumexp[at])
                choice.best_confidence[at] = sure
        owners = rows.row_request[tile.own][at]
        sampling = self._sampling(blocks.slots[owners])
        cut = self._truncates[slots]
        drawn = draw(
            processed,
            argmax=argmax,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=blocks.requests.seed[owners],
            position=blocks.positions.flatten()[rows.row_places[tile.own][at]],
            step=tile.step[owners],
            rows=on_device((self._draws[slots] & ~cut).nonzero()[0]),
            truncated_rows=on_device(cut.nonzero()[0]),
            banned=logits.banned_in(at + tile.rows.start),
            ban_id=logits.mask_id,
            shard=shard,
        )
        drawn = torch.where(masked, drawn, argmax)
        is_first = rows.row_offset_np[tile.own][some] == 0
        greedy = on_device(self._leads_greedily[slots] & is_first)
        drawn = torch.where(greedy, argmax, drawn)
        logsumexp = choice.logsumexp[at]
        sure = prob_of(raw, drawn, logsumexp, shard)
        if stuck is not None:
            choice.logsumexp[at] = logsumexp.masked_fill(stuck, -torch.inf)
        choice.candidate[at] = drawn
        choice.confidence[at] = sure
        measured = self._measures_drawn[slots].nonzero()[0]
        if len(measured):
            self._measure_drawn(choice, processed, sampling, at, on_device(measured))

    def _choose_others(self, choice: Choice, tile: Tile) -> None:
        """Find the best text besides the candidates, which are chosen already."""
        logits, besides = tile.logits, self.facts.defaults.edit_tokens or ()
        choice.other.copy_(
            next_best(
                tile.values,
                choice.candidate,
                besides,
                banned=logits.banned_in(tile.rows),
                ban_id=logits.mask_id,
                shard=logits.shard,
            )
        )
        (some,) = self._restricts()[tile.slots_np].nonzero()
        if not len(some):
            return
        at = torch.from_numpy(some).to(logits.device, non_blocking=True)
        allowed = logits.whole(tile.values[at], at + tile.rows.start)
        allowed = allowed.to(torch.float32, copy=True)
        self._restrict(allowed, some + tile.own.start, tile.blocks)
        choice.other[at] = next_best(allowed, choice.candidate[at], besides)

    def _sampling(self, slots: torch.Tensor) -> Sampling:
        """The sampling parameters of rows of these slots [n]."""
        return Sampling(
            self.slots.temperature[slots],
            self.slots.top_k[slots],
            self.slots.top_p[slots],
            self.slots.min_p[slots],
        )

    def _measure_drawn(
        self,
        choice: Choice,
        processed: torch.Tensor,
        sampling: Sampling,
        at: torch.Tensor,
        measured: torch.Tensor,
    ) -> None:
        """Overwrite statistics by those of what is drawn from, where asked for.

        Args:
            processed: [n, V], restricted logits.
            sampling: of these rows.
            at: [n] int64: which rows of `choice` they are.
            measured: [m] int64: which of the n ask for it.
        """
        # Sorting a row takes several times its memory: some rows at a time.
        for part in measured.split(rows_per_slice(processed)):
            shaped = tempered(processed[part], *sampling.at(part))
            stats = token_stats(shaped, need_entropy=True, need_margin=True)
            places = at[part]
            tokens = choice.candidate[places]
            choice.confidence[places] = prob_of(shaped, tokens, stats.logsumexp)
            choice.entropy[places] = given(stats.entropy, "entropy")
            choice.margin[places] = given(stats.margin, "margin")

    def random_tokens(self, step: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[R, B] int64: what positions hold that are not decided, in the next step.

        Args:
            step: [R] int64.
        """
        seed, size = blocks.requests.seed, self.facts.vocab_size
        step = step + 1
        return random_tokens(seed[:, None], blocks.positions, step[:, None], size)

    def noise(self, step: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[R, B] float32 in [0, 1): a number of each position's own.

        Args:
            step: [R] int64.
        """
        seed = blocks.requests.seed
        return uniform(seed[:, None], blocks.positions, step[:, None])

    def _restricts(self) -> np.ndarray:
        """[slots] bool: not every token is allowed in the active block."""
        return self.slots.host.block_start < self._restricted_until

    def _restrict(
        self, logits: torch.Tensor, which: np.ndarray, rows: BlockRows
    ) -> None:
        """Apply requests' token restrictions in place.

        Args:
            logits: [n, V] float32.
            which: [n]: which of `rows` these are.
        """
        early = self._early(rows.blocks)
        requests = rows.row_request_np[which]
        for request in np.unique(requests[self._restricts()[rows.row_slots_np[which]]]):
            (mine,) = (requests == request).nonzero()
            offsets = rows.row_offset_np[which[mine]]
            restriction = self._restrictions[int(rows.slots_np[request])]
            banned = self._banned(int(request), rows)
            places = torch.from_numpy(offsets).to(logits.device, non_blocking=True)
            # A request's rows follow each other.
            part = logits[mine[0] : mine[-1] + 1]
            restriction.apply(part, early[request, places], offsets, banned)

    # -- what ends a text --------------------------------------------------

    def _early(self, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: output positions at which `min_tokens` forbids to stop."""
        output_index = blocks.positions - blocks.requests.prompt_len[:, None]
        return output_index < blocks.requests.min_tokens[:, None]

    def is_stop(self, tokens: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: the token would end its request's text there."""
        is_stop = tokens[:, :, None] == self.stop_ids.of(blocks.slots)[:, None, :]
        return is_stop.any(dim=2) & ~self._early(blocks)

    def ends_text(
        self, tokens: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """[n] bool: as `is_stop`, of any n positions, of the requests in slots [n]."""
        table = self.slots
        is_stop = (tokens[:, None] == self.stop_ids.of(slots)).any(dim=1)
        early = positions - table.prompt_len[slots] < table.min_tokens[slots]
        return is_stop & ~early

    # -- bad words ---------------------------------------------------------

    def _banned(self, row: int, plan: BlockRows) -> list[tuple[int, int]]:
        """(block offset, token) pairs that would complete a bad word."""
        words = self._restrictions[int(plan.slots_np[row])].bad_words
        if words is None:
            return []
        tokens, first = self._output(row, words.reach, plan)
        banned = words.banned(tokens, begin=max(-first, 0))
        return [(first + index, token) for index, token in banned]

    def veto_bad_words(
        self,
        commit: torch.Tensor,
        edit: torch.Tensor,
        new_tokens: torch.Tensor,
        plan: BlockRows,
    ) -> list[int]:
        """Withdraw, in place, commits and edits that would write a bad word.

        Returns:
            The rows, 0 to R - 1, that lost commits.
        """
        rows = []
        for row in self._restricts()[plan.slots_np].nonzero()[0].tolist():
            words = self._restrictions[int(plan.slots_np[row])].bad_words
            if words is None:
                continue
            tokens, first = self._output(row, words.reach, plan)
            (offsets,) = (commit[row] | edit[row]).nonzero(as_tuple=True)
            indices = (offsets - first).tolist()
            written = new_tokens[row, offsets].tolist()
            vetoed = words.vetoed(tokens, dict(zip(indices, written, strict=True)))
            places = torch.tensor(vetoed, dtype=torch.int64) + first
            if commit[row, places].any():
                rows.append(row)
            commit[row, places] = edit[row, places] = False
        return rows

    def _output(self, row: int, reach: int, plan: BlockRows) -> tuple[list[int], int]:
        """A block's output tokens and up to `reach` left of it, `MASKED` where open.

        And the block offset of the first of them.
        """
        table, slot = self.slots, int(plan.slots_np[row])
        block_start = int(table.host.block_start[slot])
        begin = max(block_start - reach, int(table.host.prompt_len[slot]))
        end = block_start + int(plan.valid_np[row].sum())
        tokens = table.tokens[slot, begin:end]
        hidden = table.masked[slot, begin:end]
        return tokens.masked_fill(hidden, MASKED).tolist(), begin - block_start
