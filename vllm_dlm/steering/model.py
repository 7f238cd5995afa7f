# SPDX-License-Identifier: Apache-2.0
"""Both models as one of vLLM's: two sub-models, each with keys and values of its own.

A forward computes both over the same rows; what it returns is their hidden states side
by side, of which `compute_logits` makes steered logits. So everything behind it is
vLLM's own: sampling, log-probabilities, penalties, grammars, prefix caching, drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from vllm.compilation.backends import set_model_tag
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix

from vllm_dlm.steering.pair import base_config, steering_of, tuned_config
from vllm_dlm.steering.rule import steer

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BASE = "base."
"""Begins the names of the base's weights."""


class DlmSteeredForCausalLM(torch.nn.Module):
    """A tuned model, steered by its base."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        steering = steering_of(vllm_config)
        self._mu, self._keep = steering.mu, steering.keep
        configs = tuned_config(vllm_config), base_config(vllm_config)
        self._widths = [each.model_config.get_hidden_size() for each in configs]
        tuned, base = (maybe_prefix(prefix, name) for name in ("tuned", "base"))
        self.tuned = initialize_model(configs[0], prefix=tuned)
        # A folder of its own for what is compiled.
        with set_model_tag("dlm_steer_base"):
            self.base = initialize_model(configs[1], prefix=base)
        self.secondary_weights = [
            DefaultModelLoader.Source(steering.base, revision=None, prefix=BASE)
        ]
        """vLLM's loader reads these behind the tuned model's."""

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The tuned model's embeddings; vLLM asks every model for this method."""
        return self.tuned.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of both models, [rows, their widths together]."""
        states = [model(input_ids, positions) for model in (self.tuned, self.base)]
        return torch.cat(states, dim=-1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Steered logits [rows, V] in float32; None on ranks that get no logits."""
        parts = hidden_states.split(self._widths, dim=-1)
        tuned, base = (
            model.compute_logits(part.contiguous())
            for model, part in zip((self.tuned, self.base), parts, strict=True)
        )
        if tuned is None or base is None:
            return None
        return steer(tuned, base, self._mu, self._keep)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load weights of either model: those of the base begin with `BASE`."""
        loaded: set[str] = set()
        for of_base, part in groupby(weights, lambda item: item[0].startswith(BASE)):
            name = "base" if of_base else "tuned"
            own = ((key.removeprefix(BASE) if of_base else key, w) for key, w in part)
            found = getattr(self, name).load_weights(own)
            loaded |= {f"{name}.{each}" for each in found or ()}
        return loaded
