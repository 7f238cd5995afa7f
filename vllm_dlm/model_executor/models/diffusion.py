# SPDX-License-Identifier: Apache-2.0
"""What every diffusion model class adds to its vLLM parent."""

from __future__ import annotations

from typing import Any

import torch


class DiffusionModelMixin:
    """Hands vLLM's runner our per-request state; put it before the vLLM class."""

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """The `ModelState` vLLM's V2 runner builds for this model."""
        from vllm_dlm.model_executor.state import DlmModelState

        return DlmModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the given rows, [rows, vocab].

        A step may have no rows to decide; gathering a zero-row tensor across
        tensor-parallel CPU workers kills them, so that case ends here.
        """
        if hidden_states.shape[0] == 0:
            vocab_size: int = self.config.vocab_size  # type: ignore[attr-defined]
            return hidden_states.new_empty((0, vocab_size))
        logits: torch.Tensor | None = super().compute_logits(hidden_states)  # type: ignore[misc]
        return logits
