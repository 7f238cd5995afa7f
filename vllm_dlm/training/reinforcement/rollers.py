# SPDX-License-Identifier: Apache-2.0
"""Who rolls out: the network that is trained itself, or an engine that serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vllm_dlm.training.learner import Learner
    from vllm_dlm.training.reinforcement.rollout_rows import RollOuts
    from vllm_dlm.training.reinforcement.rollouts import Decoder


class Roller(Protocol):
    """Rolls out answers."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> RollOuts:
        """An answer to each prompt."""


@dataclass
class TrainerRoller:
    """Rolls out with the network itself.

    Args:
        learner: The network.
        decoder: How.
        canvas: Positions of an answer.
        rows_at_once: Rows that are rolled out at once; None: all.
    """

    learner: Learner
    decoder: Decoder
    canvas: int
    rows_at_once: int | None = None
    stop_at_end: bool = False

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> RollOuts:
        from vllm_dlm.training.reinforcement.policy import parts_of
        from vllm_dlm.training.reinforcement.rollout_rows import concatenate
        from vllm_dlm.training.reinforcement.rollouts import roll_out

        learner = self.learner
        was_training = learner.network.training
        learner.network.eval()
        parts = [
            roll_out(
                learner.logits_at,
                prompts[part],
                canvas=self.canvas,
                decoder=self.decoder,
                mask_id=learner.mask_id,
                end_id=learner.end_id,
                seeds=seeds[part],
                device=learner.device,
                attention_block=learner.attention_block,
                stop_at_end=self.stop_at_end,
            )
            for part in parts_of(len(prompts), self.rows_at_once)
        ]
        learner.network.train(was_training)
        return concatenate(parts, learner.end_id)
