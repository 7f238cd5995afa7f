# SPDX-License-Identifier: Apache-2.0
"""What ends a model's turn inside its engine: a logits processor, for either runner.

A request of a pair carries `extra_args["ead"]`: the rule, the model that writes, and a
reserved token. When the rule fires, that token becomes the only possible one, and ends
the request, being one of its `stop_token_ids`. At all other steps it is impossible, so
that it can mean nothing else. Requests without the key are untouched.

The entropy is of the row behind masks (allowed tokens, bad words, minimum length, bias)
and before penalties and temperature. vLLM's model runner V1 calls processors just
there; V2 calls them behind the penalties (`entropy_stop_v2.py`). `EntropyStop`, here,
is for V1. It cannot run under speculative decoding; vLLM refuses that.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vllm_dlm.messages import explain
from vllm_dlm.option_types import Count
from vllm_dlm.switching.entropy import Model, SwitchRule, Turn, entropy_bits

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

KEY = "ead"

_turns = count()


class Stop(BaseModel):
    """What a turn's request says to the processor."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    rule: SwitchRule
    model: Model = Field(description="who writes")
    token_id: Count = Field(ge=0, description="the reserved token")
    turn: Count = Field(
        ge=0, description="the turn's number, by which it is known after a preemption"
    )


def stop_options(rule: SwitchRule, model: Model, token_id: int) -> dict[str, Any]:
    """What the request of a new turn says to the processor, for its `extra_args`."""
    stop = Stop(rule=rule, model=model, token_id=token_id, turn=next(_turns))
    return {KEY: stop.model_dump()}


def stop_of(params: SamplingParams) -> Stop | None:
    """What a request says to the processor; None where switching does not concern it.

    Raises:
        ValueError: it says something that is not valid.
    """
    options = (params.extra_args or {}).get(KEY)
    if options is None:
        return None
    try:
        return Stop.model_validate(options)
    except ValidationError as error:
        raise ValueError(f"{KEY}: {explain(error)}") from None


def class_name(vllm_config: VllmConfig) -> str:
    """The processor for an engine's model runner, as `logits_processors` names it."""
    if vllm_config.use_v2_model_runner:
        return "vllm_dlm.switching.entropy_stop_v2:EntropyStopV2"
    return f"{__name__}:{EntropyStop.__name__}"


class _Row:
    """A request's place in the batch."""

    def __init__(self, turn: Turn, token_id: int, output_ids: list[int]) -> None:
        self.turn = turn
        self.token_id = token_id
        self.output_ids = output_ids
        """The request's own list, which grows."""


class EntropyStop(LogitsProcessor):
    """Ends a turn when the rule says so; see the module docstring."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool
    ) -> None:
        self._rows: dict[int, _Row] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request whose key `ead` is not valid.

        Raises:
            ValueError: it says what is valid.
        """
        stop_of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: the processor replaces the most likely token."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that came, went and moved."""
        process_dict_updates(self._rows, batch_update, self._add)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """End turns in `logits` [requests, V], in place."""
        if not self._rows:
            return logits
        indices = list(self._rows)
        rows = list(self._rows.values())
        # One copy to the host for the whole batch.
        entropies = entropy_bits(logits[indices]).tolist()
        token_ids = [row.token_id for row in rows]
        logits[indices, token_ids] = -torch.inf
        ended = [
            (index, row.token_id)
            for index, row, entropy in zip(indices, rows, entropies, strict=True)
            if row.turn.ends(len(row.output_ids), entropy)
        ]
        if ended:
            logits[[index for index, _ in ended]] = -torch.inf
            for index, token_id in ended:
                logits[index, token_id] = 0
        return logits

    @staticmethod
    def _add(
        params: SamplingParams, prompt_ids: list[int] | None, output_ids: list[int]
    ) -> _Row | None:
        stop = stop_of(params)
        if stop is None:
            return None
        # A request that waits for memory leaves the batch and comes back with the same
        # parameters: they keep its entropies meanwhile.
        turn = vars(params).get("_ead_turn")
        if turn is None:
            turn = vars(params)["_ead_turn"] = Turn(stop.rule, stop.model)
        return _Row(turn, stop.token_id, output_ids)
