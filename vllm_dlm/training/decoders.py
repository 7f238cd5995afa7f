# SPDX-License-Identifier: Apache-2.0
"""Networks of transformers as diffusion language models: Qwen2 as Dream, Qwen3 as SDAR.

What a token sees is this module's: everything (Dream, arXiv 2508.15487), or all blocks
of B tokens up to its own, counted from the first token (SDAR, arXiv 2510.06303).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from vllm_dlm.files.model_folders import WEIGHTS, check_weights
from vllm_dlm.files.whole_files import BadFile
from vllm_dlm.training.attention import Seen, attend, combine
from vllm_dlm.training.network import TrainedNetwork

Network = TypeVar("Network", bound=PreTrainedModel)

_ATTENTION = "dlm_training"
"""Name of `_attend` among transformers' ways to compute attention."""


class DecoderModel(TrainedNetwork):
    """A causal language model of transformers under another mask.

    Args:
        network: The model, with its head.
        attention_block: Tokens B of a block; None if every token sees all of its row.
    """

    def __init__(
        self, network: PreTrainedModel, attention_block: int | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.attention_block = attention_block
        network.set_attn_implementation(_ATTENTION)

    @property
    def head_dim(self) -> int:
        """Numbers of a query of one head."""
        config = self.network.config
        heads = config.num_attention_heads
        return int(getattr(config, "head_dim", None) or config.hidden_size // heads)

    @property
    def checkpointing(self) -> bool:
        """Whether training computes each layer twice, and keeps its input only."""
        return bool(self.network.is_gradient_checkpointing)

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        if on:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.network.gradient_checkpointing_disable()

    def hidden(
        self,
        input_ids: Tensor,
        valid: Tensor | None = None,
        *,
        seen: Seen = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        if seen is None and self.attention_block is not None:
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            block = places // self.attention_block
            seen = (block <= block[:, None])[None]
        decoder: Any = self.network.get_decoder()
        # As a dict a mask is taken as it is: any other is combined with a causal one.
        return decoder(
            input_ids=input_ids,
            attention_mask={"full_attention": combine(seen, valid)},
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        head: Any = self.network.get_output_embeddings()
        return head(hidden)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by the names that a checkpoint has."""
        return dict(self.named_for_checkpoint(self.state_dict().items()))

    def named_for_checkpoint(
        self, tensors: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """This module's state dict, by the names that a checkpoint has."""
        tied = self.network.config.tie_word_embeddings
        for name, tensor in tensors:
            theirs = name.removeprefix("network.")
            # One tensor of two names, which safetensors refuses; loading ties them.
            if not (tied and theirs == "lm_head.weight"):
                yield theirs, tensor


def load_decoder(
    kind: type[Network],
    model_dir: str | Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None = torch.float32,
) -> Network:
    """Load a checkpoint into a network of transformers, in eval mode.

    Args:
        kind: The network's class.
        model_dir: The checkpoint's folder.
        config: Its configuration.
        dtype: Type of the weights in memory; None for that which they are stored in.

    Raises:
        ValueError: weights are missing, or are not finite.
    """
    network, info = kind.from_pretrained(
        model_dir,
        config=config,
        dtype="auto" if dtype is None else dtype,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        # transformers would go on with random ones.
        reason = f"{len(missing)} tensors are missing, such as {missing[0]}"
        raise BadFile(WEIGHTS, model_dir, reason)
    check_weights(network.state_dict(), network, model_dir)
    return network.eval()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Seen,
    **options: Any,
) -> tuple[Tensor, None]:
    """Our `attend`, as transformers calls it."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    output = attend(query, key, value, attention_mask, module.training)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attend)
