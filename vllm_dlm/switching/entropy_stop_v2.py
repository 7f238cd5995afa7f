# SPDX-License-Identifier: Apache-2.0
"""The logits processor that ends a model's turn, on model runner V2.

`entropy_stop.py` says what it does. Here nothing is known on the host: how many tokens
a request has, and which of several drafted ones count, the device finds out. So the
entropies of a turn stay on the device, and a step waits for nothing.

A turn's entropies lie in its place in a table, the entropy of its token i (from 0) in
column i modulo the table's width. A request that is preempted leaves its slot and comes
back in another, to the same place: vLLM tells a processor neither that a request has
ended nor that it has not, so places are taken from the turn that was admitted longest
ago, and there are several times as many of them as slots. Should that ever be too few,
NaNs stand for what was lost, and the turn goes on until its window is full again.

Rows are behind vLLM's penalties. Of those, a pair allows `repetition_penalty`, which is
undone for the entropy: it is the same as on runner V1, up to rounding.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils import torch_utils
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor

from vllm_dlm.switching.entropy import MAX_WINDOW, SMALL, entropy_bits
from vllm_dlm.switching.entropy_stop import stop_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )

PLACES_PER_SLOT = 4

_NO_TURN = (-1, 0, 1, 0, 1, 0, 1)
"""Facts of a slot that switching does not concern: place, reserved token, 1 for the
small model and -1 for the large one, tau in bits, window, fewest tokens, repetition
penalty."""


class Places:
    """Which turn has which place.

    Args:
        count: how many places there are; more than slots.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._place_of: OrderedDict[int, int] = OrderedDict()
        self._turn_in: dict[int, int] = {}

    def take(self, slot: int, turn: int) -> tuple[int, bool]:
        """The place of the turn that comes into a slot, and whether it is a new one."""
        self._turn_in[slot] = turn
        if turn in self._place_of:
            self._place_of.move_to_end(turn)
            return self._place_of[turn], False
        place = len(self._place_of)
        if place == self._count:
            running = set(self._turn_in.values())
            oldest = next(each for each in self._place_of if each not in running)
            place = self._place_of.pop(oldest)
        self._place_of[turn] = place
        return place, True

    def leave(self, slot: int) -> None:
        """A request without a turn comes into a slot."""
        self._turn_in.pop(slot, None)


class EntropyStopV2(LogitsProcessor):
    """Ends a turn when the rule says so; see the module docstring."""

    def __init__(
        self, vllm_config: VllmConfig, req_states: LogitsProcRequestState
    ) -> None:
        self._requests = req_states
        slots, device = req_states.max_num_reqs, req_states.device
        self._num_drafts: int = vllm_config.num_speculative_tokens
        self._places = Places(PLACES_PER_SLOT * slots)
        self._new_places: list[int] = []
        # [slots, 7]; in float64 token ids are exact, and tau what a request said.
        self._facts_np = np.tile(np.array(_NO_TURN, dtype=np.float64), (slots, 1))
        self._facts = torch.from_numpy(self._facts_np.copy()).to(device)
        self._is_staged = False
        # The last place is no turn's: what is not to be remembered is written there.
        # Drafts behind a rejected one have columns of their own.
        self._width = MAX_WINDOW + self._num_drafts
        self._entropies = torch.full(
            (PLACES_PER_SLOT * slots + 1, self._width), torch.nan, device=device
        )

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose key `ead` is not valid.

        Raises:
            ValueError: it says what is valid.
        """
        stop_of(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Whether the request that comes into a slot is a turn."""
        self._is_staged = True
        stop = stop_of(sampling_params)
        if stop is None:
            self._places.leave(req_idx)
            self._facts_np[req_idx] = _NO_TURN
            return False
        place, is_new = self._places.take(req_idx, stop.turn)
        if is_new:
            self._new_places.append(place)
        self._facts_np[req_idx] = (
            place,
            stop.token_id,
            1 if stop.model == SMALL else -1,
            stop.rule.tau_bits,
            stop.rule.window,
            stop.rule.min_tokens,
            sampling_params.repetition_penalty,
        )
        return True

    def apply_staged_writes(self) -> None:
        """Tell the device which requests have come."""
        if not self._is_staged:
            return
        self._is_staged = False
        torch_utils.async_tensor_h2d(self._facts_np, out=self._facts)
        if self._new_places:
            places = torch_utils.async_tensor_h2d(
                self._new_places, device=self._facts.device, dtype=torch.int64
            )
            self._entropies.index_fill_(0, places, torch.nan)
            self._new_places.clear()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """End turns in `logits` [rows, V] float32, in place."""
        facts_np = self._facts_np[ctx.idx_mapping_np]
        if (facts_np[:, 0] < 0).all():
            return logits
        slots = ctx.expanded_idx_mapping.long()
        place, token, sign, tau, window, least, penalty = self._facts[slots].unbind(-1)
        is_turn = place >= 0
        rows = logits
        if (facts_np[:, 6] != 1).any():
            rows = self._without_penalty(logits, ctx, slots, penalty.float())
        # Rows inside a prompt that is computed in parts judge no token.
        is_next = ctx.pos + 1 >= self._requests.total_len.gpu[slots]
        place = torch.where(is_next, place, -1).long()
        written = ctx.pos + 1 - self._requests.prompt_len.gpu[slots]
        self._entropies[place, written % self._width] = entropy_bits(rows)
        back = torch.arange(int(facts_np[:, 4].max()), device=logits.device)
        columns = (written[:, None] - back) % self._width
        counted = back < window[:, None]
        entropies = self._entropies[place[:, None], columns].double()
        mean = torch.where(counted, entropies, 0).sum(-1) / window
        ends = (place >= 0) & (written >= least) & (sign * (mean - tau) >= 0)
        column = token.long()[:, None]
        reserved = torch.where(
            is_turn[:, None], -torch.inf, logits.gather(1, column)
        ).masked_fill_(ends[:, None], 0)
        return logits.masked_fill_(ends[:, None], -torch.inf).scatter_(
            1, column, reserved
        )

    def _without_penalty(
        self,
        logits: torch.Tensor,
        ctx: LogitsContext,
        slots: torch.Tensor,
        penalty: torch.Tensor,
    ) -> torch.Tensor:
        """Rows [rows, V] as they were before `repetition_penalty` [rows]."""
        num_rows, vocabulary = logits.shape
        longest = int(ctx.seq_lens_upper_bound_np.max())
        ids = self._requests.all_token_ids.gpu[slots, :longest].long()
        known = self._requests.total_len.gpu[slots, None]
        is_known = torch.arange(ids.shape[1], device=logits.device) < known
        # One column more, for places without a token.
        seen = torch.zeros(
            num_rows, vocabulary + 1, dtype=torch.bool, device=logits.device
        ).scatter_(1, torch.where(is_known, ids, vocabulary), True)
        # The drafts that a row follows are its own input and those of the rows above
        # it, as many as its offset says.
        for back in range(self._num_drafts):
            drafted = ctx.input_ids.roll(back).long()
            # -1 is no token.
            is_drafted = (ctx.expanded_local_pos > back) & (drafted >= 0)
            drafted = torch.where(is_drafted, drafted, vocabulary)
            seen.scatter_(1, drafted[:, None], True)
        penalty = penalty[:, None]
        undone = torch.where(logits > 0, logits * penalty, logits / penalty)
        return torch.where(seen[:, :vocabulary], undone, logits)
