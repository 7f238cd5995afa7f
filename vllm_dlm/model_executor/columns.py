# SPDX-License-Identifier: Apache-2.0
"""Columns: the tensors of the request table (`slots.py`), and its columns by name.

Columns of one type that are written together are one tensor, so that a step gathers the
facts of its requests with one operation, and admissions write them with one
(`staging.py`). Each column is also there under its own name, as a view.

All tensors have a row more than there are slots. This last row, `num_slots`, belongs to
a **dummy slot**: a batch that is padded reads and writes it. What the dummy slot holds
is of no request, but every division that a step makes by it is safe.
"""

from __future__ import annotations

from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_dlm.config.cache import FAR, Reach
from vllm_dlm.model_executor.staging import Staging
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, numeric_fields

NEVER = 1 << 62
"""Steps that no block takes."""

NO_TOKEN = -1
"""Where a row of `Columns.stop_ids` has no further id."""

REACH = tuple(f"reach_{name}" for name in Reach._fields)

FACTS = (
    "prompt_len",
    "longest",
    "text_end",
    "block_length",
    "sub_block_length",
    "steps_per_block",
    *REACH,
    "eotp",
    "growth_expansion",
    "growth_window",
    "exact",
    "opens_alone",
    "may_rewrite",
    "step_limit",
    "reference_steps",
    "has_branches",
    "min_tokens",
    "seed",
    "top_k",
    "seat",
)
"""Columns of `Columns.facts`, in order; strategies' integer parameters follow."""

FLOATS = ("eotp_threshold", "growth_threshold", "temperature", "top_p", "min_p")
"""Columns of `Columns.facts_f`, in order; strategies' other parameters follow."""

LIVE = (
    *("block_start", "canvas_end", "emitted", "step", "block_masks", "frontier"),
    "phase",
)
"""Columns of `Columns.live`, in order."""

DUMMY: dict[str, float] = {
    "text_end": 1,
    "block_length": 1,
    "sub_block_length": 1,
    "steps_per_block": 1,
    "reach_refresh_every": 1,
    "reach_part": 1,
    "step_limit": NEVER,
    "reference_steps": NEVER,
    "top_p": 1,
}
"""What the dummy slot holds; 0 in all other columns."""

STOP_IDS = 8
"""Stop ids of a request that the table has room for (`candidates.py` keeps others)."""

FEWEST_NUMBERS = 4
"""Columns for strategies' parameters, of each type, that there are in any case: for a
strategy that is registered while an engine runs."""


class Requests(NamedTuple):
    """The columns of R requests that a step reads, gathered in few operations.

    [R] each, int64 where nothing else is said; `Columns` explains them.
    """

    prompt_len: torch.Tensor
    longest: torch.Tensor
    text_end: torch.Tensor
    block_length: torch.Tensor
    sub_block_length: torch.Tensor
    steps_per_block: torch.Tensor
    reach: Reach
    """A column for each field."""
    eotp: torch.Tensor
    eotp_threshold: torch.Tensor
    """float32."""
    exact: torch.Tensor
    """bool."""
    opens_alone: torch.Tensor
    """bool."""
    may_rewrite: torch.Tensor
    """bool."""
    step_limit: torch.Tensor
    reference_steps: torch.Tensor
    has_branches: torch.Tensor
    """bool."""
    min_tokens: torch.Tensor
    seed: torch.Tensor
    seat: torch.Tensor
    block_start: torch.Tensor
    canvas_end: torch.Tensor
    emitted: torch.Tensor
    step: torch.Tensor
    block_masks: torch.Tensor
    frontier: torch.Tensor
    phase: torch.Tensor

    @classmethod
    def of(cls, columns: Columns, slots: torch.Tensor) -> Requests:
        """The requests in slots [R]."""
        named = dict(zip(FACTS, columns.facts[slots].unbind(1), strict=False))
        named |= zip(LIVE, columns.live[slots].unbind(1), strict=True)
        return cls(
            named["prompt_len"],
            named["longest"],
            named["text_end"],
            named["block_length"],
            named["sub_block_length"],
            named["steps_per_block"],
            Reach(*(named[name] for name in REACH)),
            named["eotp"],
            columns.eotp_threshold[slots],
            named["exact"] != 0,
            named["opens_alone"] != 0,
            named["may_rewrite"] != 0,
            named["step_limit"],
            named["reference_steps"],
            named["has_branches"] != 0,
            named["min_tokens"],
            named["seed"],
            named["seat"],
            named["block_start"],
            named["canvas_end"],
            named["emitted"],
            named["step"],
            named["block_masks"],
            named["frontier"],
            named["phase"],
        )


class Constants(NamedTuple):
    """What no step writes to, in one memory: tensors, or arrays on the host."""

    facts: Any
    stop_ids: Any
    facts_f: Any
    numbers: Any
    numbers_f: Any

    @staticmethod
    def width(integers: int, floats: int) -> int:
        """Columns of 64 bits for so many parameters of strategies of each type."""
        return len(FACTS) + integers + STOP_IDS + -(-(len(FLOATS) + floats) // 2)

    @classmethod
    def of(cls, whole: Any, as_floats: Any, integers: int, floats: int) -> Constants:
        """The parts of what is `width` wide.

        Args:
            whole: [rows, width] int64.
            as_floats: the same memory, [rows, 2 * width] float32.
        """
        width, first = len(FACTS) + integers, 2 * (len(FACTS) + integers + STOP_IDS)
        facts = whole[:, :width]
        facts_f = as_floats[:, first : first + len(FLOATS) + floats]
        return cls(
            facts,
            whole[:, width : width + STOP_IDS],
            facts_f,
            facts[:, len(FACTS) :],
            facts_f[:, len(FLOATS) :],
        )


class Columns:
    """The tensors of the request table; S = `num_slots`, L = `length`.

    Args:
        num_slots: requests that there can be at a time.
        length: positions that a request can have.
        device: the engine's.
    """

    def __init__(self, num_slots: int, length: int, device: torch.device) -> None:
        rows, numbers = num_slots + 1, room_for_numbers()

        def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=device)

        # -- written when a request is admitted ----------------------------------
        self._constants = zeros(Constants.width(*numbers), torch.int64)
        constants = Constants.of(
            self._constants, self._constants.view(torch.float32), *numbers
        )
        self.facts: torch.Tensor = constants.facts
        """[S + 1, F] int64: `FACTS`, and integer parameters of strategies."""
        self.stop_ids: torch.Tensor = constants.stop_ids
        """[S + 1, `STOP_IDS`] int64: tokens that end a text; `NO_TOKEN` for none."""
        self.facts_f: torch.Tensor = constants.facts_f
        """[S + 1, G] float32: `FLOATS`, and other parameters of strategies."""
        self.numbers: torch.Tensor = constants.numbers
        """[S + 1, ...] int64: integer parameters of each request's strategy."""
        self.numbers_f: torch.Tensor = constants.numbers_f
        """[S + 1, ...] float32: its other parameters that are numbers."""

        # -- written by every step, too ------------------------------------------
        self.live = zeros(len(LIVE), torch.int64)
        """[S + 1, 7] int64: `LIVE`."""
        # int32 as vLLM's own token buffers; 4 bytes x slots x max_model_len.
        self.tokens = zeros(length, torch.int32)
        """[S + 1, L] int32."""
        # A bitmap, not a comparison with the mask id: a literal mask token in a
        # prompt is ordinary text.
        self.masked = zeros(length, torch.bool)
        """[S + 1, L] bool."""

        self.lookout_end = torch.full((rows,), FAR, dtype=torch.int64, device=device)
        """[S + 1] int64: where this step's forward predicts an end of the text right
        of the active block, for the option `eotp`; `FAR` for nowhere (`lookout.py`)."""

        self.lookout_counts = zeros(3, torch.int64)
        """[S + 1, 3] int64: of the same rows, `growth.Ends`."""

        # -- columns [S + 1] by name; flags are 0 or 1 ---------------------------
        named = dict(zip(FACTS, self.facts.unbind(1), strict=False))
        named |= zip(FLOATS, self.facts_f.unbind(1), strict=False)
        named |= zip(LIVE, self.live.unbind(1), strict=True)
        self.prompt_len = named["prompt_len"]
        self.longest = named["longest"]
        """Tokens of the prompt and of the longest output."""
        self.text_end = named["text_end"]
        """End of the block in which the longest text ends."""
        self.block_length = named["block_length"]
        self.sub_block_length = named["sub_block_length"]
        self.steps_per_block = named["steps_per_block"]
        """Denoise steps of a block by the step schedule."""
        first = FACTS.index(REACH[0])
        self.reach = self.facts[:, first : first + len(REACH)]
        """[S + 1, fields of `cache.Reach`]: the cache policy."""
        self.eotp = named["eotp"]
        """Index into `eotp.MODES`."""
        self.eotp_threshold = named["eotp_threshold"]
        self.growth_expansion = named["growth_expansion"]
        self.growth_window = named["growth_window"]
        self.growth_threshold = named["growth_threshold"]
        """The growth policy (`config/growth.py`)."""
        self.exact = named["exact"]
        """`reference_exact`: the mask id may be predicted, as in the references."""
        self.opens_alone = named["opens_alone"]
        """A block's first step writes its first token alone (`opening.py`)."""

        self.may_rewrite = named["may_rewrite"]
        """Decided positions may be changed."""
        self.step_limit = named["step_limit"]
        """Steps after which a block ends in any case."""
        self.reference_steps = named["reference_steps"]
        """With `reference_exact`, steps after which what is masked in a block is text;
        `NEVER` without, and where the published loop has no such end."""
        self.has_branches = named["has_branches"]
        """Drafts are evaluated beside the canvas."""
        self.seat = named["seat"]
        """Row of the request in the memory of its group (`groups.py`)."""

        self.temperature = named["temperature"]
        self.top_p = named["top_p"]
        self.min_p = named["min_p"]
        self.top_k = named["top_k"]
        self.seed = named["seed"]
        """Of what is drawn for the request."""
        self.min_tokens = named["min_tokens"]

        self.canvas_end = named["canvas_end"]
        """One past the canvas's last position."""
        self.block_start = named["block_start"]
        """Position of the active block's first token."""
        self.step = named["step"]
        """Denoise steps spent on the active block."""
        self.block_masks = named["block_masks"]
        """Masks the active block began with: what the step schedule divides."""
        self.frontier = named["frontier"]
        """First position that is not final."""
        self.phase = named["phase"]
        """What that was before the active block's last refresh; `ALWAYS` where all of
        its steps are refreshes from now on (`layout.refreshes`)."""
        self.emitted = named["emitted"]
        """Output tokens handed to the scheduler so far."""

        self.stop_ids.fill_(NO_TOKEN)
        for name, value in DUMMY.items():
            named[name][num_slots] = value
        self._staging = Staging([self._constants, self.live, self.tokens, self.masked])
        self._staged = MappingProxyType(self._staged_columns(numbers))
        """By name, [places(, ...)]: columns of what is staged; always the same."""

    def _staged_columns(self, numbers: tuple[int, int]) -> dict[str, np.ndarray]:
        whole, live, tokens, masked = self._staging.arrays
        constants = Constants.of(whole, whole.view(np.float32), *numbers)
        return {
            **dict(zip(FACTS, constants.facts.T, strict=False)),
            **dict(zip(FLOATS, constants.facts_f.T, strict=False)),
            **dict(zip(LIVE, live.T, strict=True)),
            "stop_ids": constants.stop_ids,
            "numbers": constants.numbers,
            "numbers_f": constants.numbers_f,
            "tokens": tokens,
            "masked": masked,
        }

    def stage(self, slot: int, **values: Any) -> None:
        """Set columns of a request that is being admitted, by name.

        `write_staged` writes them; what nobody sets is 0 then.

        Args:
            values: a number or, where a column has a row for each slot, a sequence of
                numbers, which may be shorter than the row.
        """
        place = self._staging.place_of(slot)
        for name, value in values.items():
            column = self._staged[name]
            if column.ndim == 1:
                column[place] = value
            else:
                column[place, : len(value)] = value

    def write_staged(self) -> None:
        """Write what was staged since the last time: four operations, for any number
        of requests, that wait for nothing."""
        self._staging.write()

    @property
    def num_slots(self) -> int:
        """Requests that there can be at a time; also the number of the dummy slot."""
        return self.tokens.shape[0] - 1

    @property
    def length(self) -> int:
        """Positions that a request can have."""
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the columns are."""
        return self.tokens.device


@cache
def number_columns(params: type[Params]) -> dict[str, tuple[bool, int]]:
    """Where a strategy's numeric parameters lie, by name, in field order.

    A request has one strategy, so that all strategies share the columns.

    Returns:
        Whether it is an integer, and its column in `Columns.numbers` or, of others,
        in `Columns.numbers_f`.
    """
    columns: dict[str, tuple[bool, int]] = {}
    count = {True: 0, False: 0}
    for name in numeric_fields(params):
        is_int = params.model_fields[name].annotation is int
        columns[name] = is_int, count[is_int]
        count[is_int] += 1
    return columns


def room_for_numbers() -> tuple[int, int]:
    """Columns for integer parameters, and for others, that any strategy needs."""
    most = {True: FEWEST_NUMBERS, False: FEWEST_NUMBERS}
    for name in STRATEGIES:
        try:
            params = STRATEGIES[name].Params
        except Exception:
            # Another package's, which is broken: who asks for it is told so.
            continue
        for is_int, column in number_columns(params).values():
            most[is_int] = max(most[is_int], column + 1)
    return most[True], most[False]
