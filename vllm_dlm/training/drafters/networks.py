# SPDX-License-Identifier: Apache-2.0
"""The networks that `vllm-dlm train deer` trains: to make, load, draft and save.

Of two layouts: LLaDA's, which attends both ways, and SDAR's, which is block-causal.
Both map token ids and a mask of valid places to logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from vllm_dlm.config.aliases import resolve
from vllm_dlm.files.model_folders import Config
from vllm_dlm.files.whole_files import write_json
from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.block_causal import (
    BlockCausalModel,
    export_block_causal,
    export_block_causal_like,
    load_block_causal,
    make_block_causal,
)
from vllm_dlm.training.drafters.teacher import load_tokenizer
from vllm_dlm.training.tiny.export import export
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape, load_llada
from vllm_dlm.training.weights import sizes_of, write_like

Network: TypeAlias = LLaDAModel | BlockCausalModel

SHAPE = LLaDAShape(
    vocab_size=tokenizer.VOCAB_SIZE,
    d_model=96,
    n_layers=3,
    n_heads=3,
    mlp_hidden_size=128,
)
"""Sizes of a fresh drafter: those of llama-tiny-draft, but one more layer.

One step has to say what the draft model says in many, so that depth is worth more.
"""


@dataclass(frozen=True)
class Drafter:
    """A network and its mask token."""

    network: Network
    mask_id: int

    def draft(self, prefixes: list[list[int]], width: int) -> list[list[int]]:
        """`width` tokens behind each prefix, from one denoising step, greedily."""
        ends = torch.tensor([len(prefix) for prefix in prefixes])
        length = int(ends.max()) + width
        ids = torch.full((len(prefixes), length), self.mask_id)
        for row, prefix in enumerate(prefixes):
            ids[row, : len(prefix)] = torch.tensor(prefix)
        valid = torch.arange(length) < ends[:, None] + width
        device = next(self.network.parameters()).device
        columns = ends[:, None] + torch.arange(width)
        with torch.inference_mode():
            logits = self.network(ids.to(device), valid.to(device)).cpu()
            logits[:, :, self.mask_id] = float("-inf")
            return logits.argmax(-1).gather(1, columns).tolist()

    def save(
        self,
        output_dir: str | Path,
        like: str | None = None,
        draft_length: int | None = None,
    ) -> None:
        """Write it as a folder.

        Args:
            output_dir: The folder.
            like: Folder or alias of the model that it was loaded from, whose tokenizer
                and configuration stay; None for a fresh one.
            draft_length: Masks behind a text that it was trained for, by which it
                drafts unless a user says otherwise.
        """
        network = self.network
        if isinstance(network, BlockCausalModel):
            if like is None:
                export_block_causal(network, output_dir)
            else:
                export_block_causal_like(network, resolve(like), output_dir)
        elif like is None:
            export(network, output_dir)
        else:
            tensors = network.state_dict()
            write_like(tensors.items(), sizes_of(tensors), resolve(like), output_dir)
        if draft_length is not None:
            config = dict(Config(Path(output_dir)).values)
            config["dlm_draft_length"] = draft_length
            write_json(Path(output_dir) / "config.json", config)


def make_drafter(target: str, attention_block: int | None = None) -> Drafter:
    """An untrained drafter of `SHAPE`.

    Args:
        target: The autoregressive model that it is for.
        attention_block: Tokens per block of a block-causal one; None attends both
            ways.

    Raises:
        ValueError: the target has another tokenizer than the built-in models, or
            there are no tokens in a block.
    """
    if load_tokenizer(target).get_vocab() != tokenizer.TOKEN_IDS:
        raise ValueError(
            f"a fresh drafter has the tokenizer of llama-tiny, and {target} another; "
            "pass a diffusion model that has the target's with --drafter"
        )
    network: Network
    if attention_block is None:
        network = LLaDAModel(SHAPE)
    else:
        network = make_block_causal(SHAPE, attention_block)
    return Drafter(network, tokenizer.MASK_ID)


def load_drafter(name: str | Path) -> Drafter:
    """Load a drafter of either layout, in eval mode.

    Args:
        name: Folder or alias.

    Raises:
        ValueError: there is no such folder, or it has another layout.
    """
    folder = Path(resolve(str(name)))
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"drafter {name}: there is no {folder / 'config.json'}; expected a folder "
            "in the layout of LLaDA or SDAR"
        )
    config = Config(folder)
    layout = config.values.get("model_type")
    try:
        if layout == "sdar":
            network = load_block_causal(folder)
            return Drafter(network, network.config.mask_token_id)
        if layout == "llada":
            return Drafter(load_llada(folder), config.token_id("mask_token_id"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"drafter {name}: {error}; expected its weights in model.safetensors, "
            "or in several files with an index"
        ) from error
    raise ValueError(
        f"drafter {name} is a {layout!r}; expected the layout of LLaDA ('llada') or "
        "SDAR ('sdar')"
    )
