# SPDX-License-Identifier: Apache-2.0
"""What every diffusion model class adds to its vLLM parent."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_dlm.model_executor.lora.targets import building_experts
from vllm_dlm.model_executor.models.experts import unstack

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    from vllm_dlm.kernels.shards import VocabShard


EMBEDDINGS = ("embed_tokens", "word_embeddings")
"""Names of the layer of token embeddings in vLLM's classes."""


class DiffusionModelMixin:
    """Hands vLLM's runner our per-request state; put it before the vLLM class."""

    lm_head: Any
    logits_processor: Any
    config: Any
    model: Any

    names_in_files: ClassVar[WeightsMapper | None] = None
    """From the names in checkpoints to vLLM's, in families that have their own."""
    embedding_modules: ClassVar[dict[str, str]] = {}
    """No adapters of embeddings and heads: vLLM has a row of logits per request."""
    _is_loaded = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with building_experts(vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    @staticmethod
    def get_model_state_cls() -> type[ModelState]:
        """The `ModelState` vLLM's V2 runner builds for this model."""
        from vllm_dlm.model_executor.state import DlmModelState

        return DlmModelState

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states as they are: the sampler runs lm_head (`logits.py`).

        What vLLM's runner takes for the logits of all rows it hands to the sampler,
        which needs them a tile at a time only.
        """
        return hidden_states

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, all of it at the first call.

        Later calls, and those of a server that began without weights (load format
        `dummy`), bring new weights in parts of any size: they are not compared with
        what the model needs.

        Raises:
            ValueError: tensors are missing, left over or do not fit.
        """
        vllm_config = get_current_vllm_config_or_none()
        if self._is_loaded or (
            vllm_config is not None and vllm_config.load_config.load_format == "dummy"
        ):
            return self._load(unstack(weights))
        from vllm_dlm.model_executor.models.weights import WeightCheck

        check = WeightCheck(self)
        with check.naming_tensors():
            loaded = self._load(check.used(weights))
        check.finish()
        self._is_loaded = True
        return loaded

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.names_in_files is None:
            loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
            return loaded
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names_in_files)

    # -- lm_head, for the sampler (`logits.Head`) --------------------------

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, V]: this rank's part of the logits of rows [n, H]."""
        is_sharded = self.lm_head.tp_size > 1
        logits: torch.Tensor = self.logits_processor(
            self.lm_head, hidden, skip_gather=is_sharded
        )
        return logits

    def gathered(self, logits: torch.Tensor) -> torch.Tensor:
        """[n, V]: all ranks' parts of these logits, side by side."""
        if self.lm_head.tp_size == 1:
            return logits
        from vllm.distributed import tensor_model_parallel_all_gather

        if len(logits) == 0:
            # vLLM's all_gather on a CPU dies of a tensor without elements.
            return logits.new_empty((0, self.logits_processor.org_vocab_size))
        whole = tensor_model_parallel_all_gather(logits)
        return whole[:, : self.logits_processor.org_vocab_size]

    @cached_property
    def _embedding(self) -> Any:
        """The layer of token embeddings, cut over ranks as lm_head is.

        Raises:
            ValueError: it is not, or its weights are quantised.
        """
        names = [name for name in EMBEDDINGS if hasattr(self.model, name)]
        layer: Any = getattr(self.model, names[0]) if names else None
        weight = getattr(layer, "weight", None)
        is_plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if not is_plain or layer.shard_indices != self.lm_head.shard_indices:
            raise ValueError(
                "mixtures of tokens need token embeddings that are not quantised, and "
                "this checkpoint has none: leave out --dlm-soft-inputs"
            )
        return layer

    def mixed(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[n, H]: embeddings of the tokens, mixed by this rank's part of their
        probabilities [n, V]; of all ranks together."""
        layer = self._embedding
        weight = layer.weight[: probabilities.shape[1]]
        mixed: torch.Tensor = probabilities.to(weight.dtype) @ weight
        if layer.tp_size == 1:
            return mixed
        from vllm.distributed import tensor_model_parallel_all_reduce

        whole: torch.Tensor = tensor_model_parallel_all_reduce(mixed)
        return whole

    @property
    def vocab_shard(self) -> VocabShard | None:
        """Which part of the vocabulary is this rank's; None for all of it."""
        if self.lm_head.tp_size == 1:
            return None
        from vllm.distributed import tensor_model_parallel_all_gather

        from vllm_dlm.kernels.shards import VocabShard

        def gather(values: torch.Tensor) -> torch.Tensor:
            if len(values) == 0:  # see `gathered`
                return values.new_empty((self.lm_head.tp_size, *values.shape))
            # As float32, bit for bit: vLLM's all_gather on a CPU knows no float64.
            halves = values.contiguous().view(torch.float32)
            ranks = tensor_model_parallel_all_gather(halves[None], dim=0)
            return ranks.view(values.dtype)

        indices = self.lm_head.shard_indices
        return VocabShard(
            first=indices.org_vocab_start_index,
            size=indices.org_vocab_end_index - indices.org_vocab_start_index,
            gather=gather,
        )
