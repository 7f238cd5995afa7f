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
from vllm_dlm.model_executor.sampling.choice import Choice, Tile
from vllm_dlm.model_executor.sampling.restricted import RestrictedRequests, is_early
from vllm_dlm.model_executor.sampling.restrictions import known_ids
from vllm_dlm.model_executor.sampling.stop_ids import StopIds, padded
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import given

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import EngineFacts
    from vllm_dlm.model_executor.planning.block_rows import Blocks
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
        self.stop_ids = StopIds(slots)
        self.restricted = RestrictedRequests(slots, facts)

    def remove(self, slot: int) -> None:
        """Forget a request that has left, and its lists of tokens."""
        self.restricted.remove(slot)
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

        # Of a text that must match a pattern, all of this is `constrained.py`'s; but
        # for what a last canvas has behind the text, where a strategy reads that, too.
        strategy = STRATEGIES[request.config.strategy]
        is_free = request.pattern is None or strategy.sets_temperature()
        draws = params.temperature > 0 and is_free
        self._draws[slot] = draws
        self._truncates[slot] = draws and (params.top_k > 0 or params.top_p < 1)
        self._cuts[slot] = self._truncates[slot] or (draws and params.min_p > 0)
        # Where the hole is elastic, what may be drawn changes, also at temperature 0.
        shapes = draws or request.layout.is_elastic
        self._measures_drawn[slot] = shapes and request.measures_drawn
        self._reads_other[slot] = "other" in strategy.needs
        self._reads_best[slot] = "best" in strategy.needs
        defaults = self.facts.defaults
        shifts_leads = defaults.leads_blocks and defaults.shift == 1
        exact = request.config.reference_exact
        # Fast-dLLM v2 never draws a block's lead.
        self._leads_greedily[slot] = shifts_leads and exact
        if is_free:
            self.restricted.add(slot, until=request.layout.prompt_len + min_tokens)
        else:
            self.restricted.remove(slot)

    # -- drawing -----------------------------------------------------------

    def are_special(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests needs more than its rows' argmax."""
        special = self._draws | self._reads_other | self.restricted.now()
        return bool(special[slots_np].any())

    def read_best(self, slots_np: np.ndarray) -> bool:
        """Whether any of these requests' strategies reads the best tokens."""
        return bool(self._reads_best[slots_np].any())

    def draw(self, slots_np: np.ndarray) -> np.ndarray:
        """[n] bool: requests of these slots [n] that draw."""
        draws: np.ndarray = self._draws[slots_np]
        return draws

    def shapes(self, slots_np: np.ndarray) -> np.ndarray:
        """[n] bool: requests in slots [n] that restrict or truncate their rows."""
        shapes: np.ndarray = (self.restricted.now() | self._cuts)[slots_np]
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
        if self.restricted.now()[slots].any():
            self.restricted.apply(shaped, some + tile.own.start, rows)
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
        slots, restricts = tile.slots_np, self.restricted.now()
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
        if self.restricted.now()[slots].any():
            # A copy, also of float32: what is restricted must not move the confidence.
            processed = raw.to(torch.float32, copy=True)
            self.restricted.apply(processed, some + tile.own.start, rows)
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
        (some,) = self.restricted.now()[tile.slots_np].nonzero()
        if not len(some):
            return
        at = torch.from_numpy(some).to(logits.device, non_blocking=True)
        allowed = logits.whole(tile.values[at], at + tile.rows.start)
        allowed = allowed.to(torch.float32, copy=True)
        self.restricted.apply(allowed, some + tile.own.start, tile.blocks)
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
            own = sampling.at(part)
            if self.slots.elastic is not None:
                # One of those may be greedy: only what it truncates counts.
                heat = torch.where(own.temperature > 0, own.temperature, 1.0)
                own = own._replace(temperature=heat)
            shaped = tempered(processed[part], *own)
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

    # -- what ends a text --------------------------------------------------

    def is_stop(self, tokens: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: the token would end its request's text there."""
        is_stop = tokens[:, :, None] == self.stop_ids.of(blocks.slots)[:, None, :]
        return is_stop.any(dim=2) & ~is_early(blocks)

    def ends_text(
        self, tokens: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """[n] bool: as `is_stop`, of any n positions, of the requests in slots [n]."""
        table = self.slots
        is_stop = (tokens[:, None] == self.stop_ids.of(slots)).any(dim=1)
        early = positions - table.prompt_len[slots] < table.min_tokens[slots]
        return is_stop & ~early
