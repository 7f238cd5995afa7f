# SPDX-License-Identifier: Apache-2.0
"""A model's folder as a network to train: what all recipes compute with.

Three layouts are known: LLaDA's (`llada`), Dream's (Qwen2 with full attention and a
shift) and SDAR's (Qwen3, block-causal). A recipe never asks which it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vllm_dlm.config.aliases import resolve
from vllm_dlm.files.model_folders import Config
from vllm_dlm.training import lora
from vllm_dlm.training.block_causal import load_block_causal
from vllm_dlm.training.decoders import DecoderModel
from vllm_dlm.training.drafters.teacher import load_tokenizer
from vllm_dlm.training.tiny.export import export_like
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, load_llada

Network: TypeAlias = LLaDAModel | DecoderModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

LAYOUTS = ("llada", "sdar")
"""`model_type` in config.json of what can be trained."""


@dataclass
class Learner:
    """A network that is trained, and what a recipe must know of it.

    Args:
        network: Maps (ids [R, L], valid [R, L]) to logits [R, L, V]; row i of them
            speaks of position i + `shift`. `logits_at` deals with that.
        mask_id: Token id of the mask.
        end_id: Token id that ends a text and fills the canvas behind it.
        shift: Whether position i is predicted by row i - 1.
        attention_block: Tokens of a block where a token sees the blocks up to its own;
            None where it sees its whole row.
        tokenizer: The model's.
        device: Where the network is.
        source: Folder that the model was loaded from.
        compute_dtype: Type that matrix products are computed in.
    """

    network: Network
    mask_id: int
    end_id: int
    shift: bool
    attention_block: int | None
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    source: Path
    compute_dtype: torch.dtype = torch.float32

    def logits_at(
        self,
        ids: Tensor,
        valid: Tensor | None,
        where: Tensor,
        **attention: Tensor,
    ) -> Tensor:
        """Logits of the tokens at some positions, [N, V] in float32.

        Only these go through the head.

        Args:
            ids: Token ids [R, L].
            valid: Bool [R, L], False at padding that nobody may attend to.
            where: Bool [R, L] with N True, in the order of `ids[where]`; False at a
                row's first position where the model has a shift.
            attention: `seen` and `positions` of the network's `hidden`.

        Raises:
            ValueError: a position has no row to its left that would predict it.
        """
        if self.shift:
            if where[:, 0].any():
                raise ValueError("a row's first position is predicted by no other")
            where = where.roll(-1, dims=1)
        with self.autocast():
            hidden = self.network.hidden(ids, valid, **attention)
            return self.network.head(hidden[where]).float()

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in `compute_dtype`."""
        return torch.autocast(
            self.device.type,
            self.compute_dtype,
            enabled=self.compute_dtype != torch.float32,
        )

    def without_adapter(self) -> AbstractContextManager[None]:
        """Compute as the model did before the training: the teacher.

        Raises:
            ValueError: there is no adapter: all weights are trained.
        """
        return lora.adapter_off(self.network)

    @property
    def has_adapter(self) -> bool:
        return lora.has_adapter(self.network)

    def save(
        self, output_dir: str | Path, *, decoding: Mapping[str, Any] | None = None
    ) -> None:
        """Write the trained model as a folder in the layout that it was loaded in.

        Args:
            output_dir: The folder; configuration and tokenizer are copied from
                `source`.
            decoding: Options of a request that become the folder's defaults.
        """
        tensors = lora.merged_tensors(self.network)
        if isinstance(self.network, DecoderModel):
            tensors = self.network.named_for_checkpoint(tensors)
        export_like(dict(tensors), self.source, output_dir)


def load_learner(
    folder: str | Path,
    *,
    lora_rank: int | None = None,
    lora_targets: str = "all",
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    device: str = "cpu",
    dtype: str | None = None,
) -> Learner:
    """Load a model to train it, in training mode.

    Args:
        folder: Folder, hub id or alias of a model in one of the layouts.
        lora_rank: Rank of an adapter, which alone is trained; None trains all weights.
        lora_targets: "reference" or "all", as `lora.target_modules`.
        lora_alpha: The adapter's scale is alpha / rank; by default 1.
        lora_dropout: Of the adapter.
        device: As PyTorch names it.
        dtype: Type that matrix products are computed in: "float32" or "bfloat16"; by
            default bfloat16 on a GPU, and float32 on a CPU.

    Raises:
        ValueError: there is no such model, it has another layout, PyTorch has no such
            device, or a value is out of range.
    """
    source = Path(resolve(str(folder)))
    if not (source / "config.json").is_file():
        raise ValueError(f"model {folder}: there is no {source / 'config.json'}")
    config = Config(source)
    layout = config.values.get("model_type")
    network: Network
    attention_block = None
    if layout == "llada":
        network = load_llada(source)
        mask_id = config.token_id("mask_token_id")
    elif layout == "sdar":
        network = load_block_causal(source)
        mask_id = network.config.mask_token_id
        attention_block = network.attention_block
    else:
        raise ValueError(
            f"model {folder} is a {layout!r}; what can be trained: "
            f"{', '.join(LAYOUTS)} (model_type in config.json)"
        )
    if lora_rank is not None:
        lora.add_adapter(
            network,
            lora_rank,
            targets=lora_targets,
            alpha=lora_alpha,
            dropout=lora_dropout,
        )
    try:
        network.to(device)
    except (RuntimeError, AssertionError) as error:
        # PyTorch asserts that it was built for a device.
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    place = torch.device(device)
    if dtype is None:
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {' or '.join(DTYPES)}, not {dtype!r}")
    tokenizer = load_tokenizer(str(folder))
    end_id = config.values.get("eos_token_id")
    if not isinstance(end_id, int):
        end_id = tokenizer.eos_token_id
    return Learner(
        network=network.train(),
        mask_id=mask_id,
        end_id=int(end_id),
        shift=False,
        attention_block=attention_block,
        tokenizer=tokenizer,
        device=place,
        source=source,
        compute_dtype=DTYPES[dtype],
    )
