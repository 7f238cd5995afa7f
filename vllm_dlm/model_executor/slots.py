# SPDX-License-Identifier: Apache-2.0
"""RequestSlots: the table of running requests, a row (slot) for each.

vLLM gives a request a slot when it is admitted and takes it back when the request ends
or is preempted. The columns lie side by side in a few tensors on the engine's device
(`columns.py`), and a step reads and writes them for its whole batch at once; `host`
holds what planning must know of them in host memory (`host_slots.py`). Each column is
written in one place:

- facts of a request, by `admit`, from its layout and options;
- facts of its strategy, by `assign_strategy`;
- what its tokens are drawn from, and which of them end it, by `Candidates.add`;
- where the request stands, by `admit` at first and by each step's advance from then on
  (`sampling/advance.py`).

A request that was preempted comes back as a new one with its finished tokens; its
active block is masked again and replayed (`layout.lay_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_dlm.kernels.draw import random_tokens
from vllm_dlm.model_executor.columns import NEVER, REACH, Columns, number_columns
from vllm_dlm.model_executor.drafts import Drafts
from vllm_dlm.model_executor.elastic import Elastic
from vllm_dlm.model_executor.host_slots import BLOCK, MASKS, OPEN_MASKS, HostSlots
from vllm_dlm.model_executor.pins import Pins
from vllm_dlm.model_executor.sampling.eotp import MODES

if TYPE_CHECKING:
    from vllm_dlm.model_executor.facts import RequestFacts
    from vllm_dlm.model_executor.planning.block_rows import Blocks
    from vllm_dlm.strategies.base import Strategy


class RequestSlots(Columns):
    """Columns of all requests, by slot; see the module docstring.

    Args:
        num_slots: requests that there can be at a time.
        length: positions that a request can have.
        mask_id: the token id that stands for a mask.
        device: the engine's.
        noise_size: of a model without a mask, the size of the vocabulary of which an
            undecided position holds a random token; 0 with a mask.
    """

    def __init__(
        self,
        num_slots: int,
        length: int,
        mask_id: int,
        device: torch.device,
        noise_size: int = 0,
    ) -> None:
        super().__init__(num_slots, length, device)
        self._mask_id = mask_id
        self._noise_size = noise_size
        self.host = HostSlots(num_slots, length)
        self.requests: dict[int, RequestFacts] = {}
        """By slot: the requests that are running."""
        self.strategies: dict[int, Strategy] = {}
        """By slot: what decides each of them."""
        self._slot_of: dict[str, int] = {}
        self._pins: Pins | None = None
        self._elastic: Elastic | None = None

    @property
    def pins(self) -> Pins | None:
        """What requests have written of their canvases; None where none has brought
        one, and in a compiled step, whose requests have not."""
        return None if torch.compiler.is_compiling() else self._pins

    @property
    def elastic(self) -> Elastic | None:
        """Of requests whose hole widens and narrows; None where there is none. No
        compiled step asks."""
        return self._elastic

    @cached_property
    def drafts(self) -> Drafts:
        """Of requests that draft; 8 bytes x slots x max_model_len once there is one."""
        return Drafts(self.tokens.shape, self._mask_id, self.device)

    # -- requests ----------------------------------------------------------

    def admit(self, slot: int, request: RequestFacts, known: Sequence[int]) -> None:
        """Give a request its prompt, its emitted tokens and a masked canvas.

        On the device, all that is so only once `write_staged` was called.

        Args:
            known: the tokens of prompt and output so far.
        """
        self.requests[slot] = request
        self._slot_of[request.id] = slot
        config, layout = request.config, request.layout
        first_mask = layout.first_mask
        tokens = self._undecided(request)
        masked = np.arange(self.length) >= first_mask
        if layout.canvas is not None:
            begun, first = layout.canvas.begun, layout.prompt_len
            end = min(first + begun.width, layout.text_end)
            masked[first:end] = is_hole = begun.is_hole
            np.copyto(tokens[first:end], begun.tokens, where=~is_hole)
            masked[: min(first_mask, len(known))] = False
            self._pins = self._pins or Pins(self.tokens.shape, self.device)
            self._pins.admit(slot, layout)
        if layout.is_elastic:
            self._elastic = self._elastic or Elastic(self.num_slots, self.device)
            self._elastic.admit(slot, layout, request.closing_ids)
        kept = known[:first_mask]
        tokens[: len(kept)] = kept
        self.stage(
            slot,
            tokens=tokens,
            masked=masked,
            # With full attention, the first forward says how wide the canvas is.
            canvas_end=0 if layout.is_full else layout.text_end,
            block_start=layout.first_block,
            frontier=layout.first_block,
            phase=layout.first_block,
            step=layout.first_step,
            block_masks=0,
            emitted=layout.num_emitted,
            prompt_len=layout.prompt_len,
            longest=layout.prompt_len + layout.max_tokens,
            text_end=layout.text_end,
            block_length=layout.block_length,
            sub_block_length=layout.sub_block_length,
            steps_per_block=layout.steps_per_block,
            **dict(zip(REACH, layout.reach, strict=True)),
            eotp=MODES.index(config.eotp),
            eotp_threshold=config.eotp_threshold,
            growth_expansion=layout.growth.expansion,
            growth_window=layout.growth.window,
            growth_threshold=layout.growth.threshold,
            exact=config.reference_exact,
            opens_alone=layout.opens_alone,
        )
        self.host.admit(
            slot,
            layout,
            masked[layout.first_block :],
            predicts_end=config.eotp != "off",
            looks_out=config.eotp == "canvas",
            exact=config.reference_exact,
            runs_ahead=request.runs_ahead,
            is_watched=request.is_watched,
        )
        if request.canvas_end:
            self.host.canvas_end[slot] = request.canvas_end

    def _undecided(self, request: RequestFacts) -> np.ndarray:
        """[length] int32: what positions hold before the first step of their block."""
        if not self._noise_size:
            return np.full(self.length, self._mask_id, dtype=np.int32)
        positions = torch.arange(self.length)
        of_request = torch.tensor(request.seed), positions, torch.tensor(0)
        tokens: np.ndarray = random_tokens(*of_request, self._noise_size).int().numpy()
        return tokens

    def assign_strategy(
        self,
        slot: int,
        strategy: Strategy,
        *,
        group: int,
        seat: int,
        wasted_steps: int,
    ) -> None:
        """Say which strategy decides a new request.

        Args:
            group: number of the strategy's group.
            seat: the request's, in the strategy's group.
            wasted_steps: steps of a block that may write nothing, beyond those that
                the strategy counts with.
        """
        request = self.requests[slot]
        config, reference_steps = request.config, None
        if config.reference_exact:
            reference_steps = strategy.reference_steps(
                config.params, request.layout.steps_per_block
            )
        self.strategies[slot] = strategy
        numbers: dict[bool, list[float]] = {True: [], False: []}
        for name, (is_int, _) in number_columns(strategy.Params).items():
            numbers[is_int].append(getattr(config.params, name))
        has_branches = "branches" in strategy.needs
        self.stage(
            slot,
            seat=seat,
            # What moves is not final before all of it is, as what may be rewritten.
            may_rewrite=strategy.may_rewrite or request.layout.is_elastic,
            step_limit=strategy.step_limit(config.params) + wasted_steps,
            reference_steps=NEVER if reference_steps is None else reference_steps,
            has_branches=has_branches,
            numbers=numbers[True],
            numbers_f=numbers[False],
        )
        if has_branches:
            self.drafts.forget(slot)
        self.host.group[slot] = group
        # In the course of its branches a request may reach the next sub-block.
        masks = MASKS if has_branches else OPEN_MASKS
        self.host.reads[slot] = BLOCK if strategy.logit_rows == "block" else masks

    def release(self, slot: int) -> None:
        """Forget a request that has ended or was preempted."""
        del self._slot_of[self.requests.pop(slot).id]
        self.strategies.pop(slot, None)
        if self._pins is not None and not self._pins.forget(slot):
            self._pins = None
        if self._elastic is not None and not self._elastic.forget(slot):
            self._elastic = None

    def slot_of(self, req_id: str) -> int | None:
        """The slot of a request; None if it is not running."""
        return self._slot_of.get(req_id)

    # -- what follows from the columns -------------------------------------

    def masks(self, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: all masks of the active blocks."""
        return self.masked[blocks.slots[:, None], blocks.places] & blocks.valid

    def is_fixed(self, blocks: Blocks) -> torch.Tensor:
        """[R, B] bool: what no strategy may change.

        What a client has: a prompt's tail, and a block's lead. And what the request has
        written itself.
        """
        requests = blocks.requests
        fixed = blocks.positions < (requests.prompt_len + requests.emitted)[:, None]
        return fixed if self.pins is None else fixed | self.pins.of(blocks)

    def ending(self, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        """Which blocks end with this step in any case.

        Returns:
            [R] bool: those that do; of these, those that keep their masks as text.
        """
        taken = blocks.requests.step + 1
        keeps_masks = taken >= blocks.requests.reference_steps
        return keeps_masks | (taken >= blocks.requests.step_limit), keeps_masks
