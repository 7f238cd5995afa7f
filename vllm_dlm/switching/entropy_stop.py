# SPDX-License-Identifier: Apache-2.0
"""The logits processor that ends a model's turn (model runner V1).

A request of a pair carries `extra_args["ead"]`: the rule, the model that writes, and a
reserved token. When the rule fires, that token becomes the only possible one, and ends
the request, being one of its `stop_token_ids`. At all other steps it is impossible, so
that it can mean nothing else.

vLLM calls processors after masks (allowed tokens, bad words, minimum length, bias) and
before penalties and temperature: that is where the entropy is taken. Requests without
the key are untouched. It cannot run under speculative decoding; vLLM refuses that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from vllm_dlm.switching.entropy import Model, SwitchRule, Turn, entropy_bits

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate

KEY = "ead"
CLASS_NAME = f"{__name__}:EntropyStop"
"""The processor's name in an engine's `logits_processors`."""


def stop_options(rule: SwitchRule, model: Model, token_id: int) -> dict[str, Any]:
    """What a request says to `EntropyStop`, for its `extra_args`."""
    return {KEY: {"rule": rule.model_dump(), "model": model, "token_id": token_id}}


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
        options = (params.extra_args or {}).get(KEY)
        if options is None:
            return None
        # A request that waits for memory leaves the batch and comes back with the same
        # parameters: they keep its entropies meanwhile.
        turn = vars(params).get("_ead_turn")
        if turn is None:
            turn = Turn(SwitchRule(**options["rule"]), options["model"])
            vars(params)["_ead_turn"] = turn
        return _Row(turn, options["token_id"], output_ids)
