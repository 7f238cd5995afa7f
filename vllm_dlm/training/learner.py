# SPDX-License-Identifier: Apache-2.0
"""A model's folder as a network to train: what all recipes compute with.

Three layouts are known: LLaDA's (`llada`), Dream's (Qwen2 with full attention and a
shift) and SDAR's (Qwen3, block-causal). A recipe never asks which it has.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from vllm_dlm.config.aliases import cached_folder, resolve
from vllm_dlm.config.levels import config_entries
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.files.model_folders import Config
from vllm_dlm.files.tensor_files import write_safetensors
from vllm_dlm.files.whole_files import write_json
from vllm_dlm.model_executor.models.declarations import check_declarations
from vllm_dlm.model_executor.models.tables import HF_CONFIGS
from vllm_dlm.model_executor.models.tokenizers import register_tokenizers
from vllm_dlm.registry import load
from vllm_dlm.training import lora
from vllm_dlm.training.block_causal import load_block_causal
from vllm_dlm.training.decoders import DecoderModel, load_decoder
from vllm_dlm.training.distributed import gather_each, is_first
from vllm_dlm.training.drafters.teacher import load_tokenizer
from vllm_dlm.training.packing import hidden_at
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, load_llada
from vllm_dlm.training.weights import sizes_of, write_like

Network: TypeAlias = LLaDAModel | DecoderModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py")
"""Files of a model that a training needs."""

LAYOUTS = ("LLaDAModelLM", "DreamModel", "SDARForCausalLM")
"""What can be trained, as `architectures` in config.json names it."""


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
        packed: Whether `logits_at` packs the rows of a batch (packing.py); None: where
            that is a gain.
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
    packed: bool | None = None

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
            hidden = hidden_at(
                self.network,
                ids,
                valid,
                where,
                packed=self.packed,
                dtype=self.compute_dtype,
                **attention,
            )
            return self.network.head(hidden).float()

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
        network = self.network
        sizes = lora.plain_tensors(network)
        tensors = lora.merged_tensors(network)
        if isinstance(network, DecoderModel):
            sizes = network.named_for_checkpoint(sizes)
            tensors = network.named_for_checkpoint(tensors)
        tensors = gather_each(tensors)
        if not is_first():
            deque(tensors, maxlen=0)  # to take part in gathering each
            return
        entries = config_entries(decoding or {})
        if self.attention_block is not None:
            # It may have grown, or have been a part of the old folder's name.
            entries["block_size"] = self.attention_block
        write_like(
            tensors,
            sizes_of(dict(sizes)),
            self.source,
            output_dir,
            config=entries,
        )

    def save_adapter(self, output_dir: str | Path) -> None:
        """Write the adapter alone, in peft's files and by the checkpoint's names.

        Args:
            output_dir: The folder. vLLM serves it beside `source`, and peft loads it.

        Raises:
            ValueError: there is no adapter: all weights are trained.
        """
        network = self.network
        config = lora.adapter_config(network)
        tensors = lora.adapter_tensors(network)
        if isinstance(network, DecoderModel):
            tensors = network.named_for_checkpoint(tensors)
        found = dict(gather_each(tensors))
        if not is_first():
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        modules = {name.partition(".lora_")[0] for name in found}
        write_safetensors(
            folder / "adapter_model.safetensors",
            {f"base_model.model.{name}": tensor for name, tensor in found.items()},
        )
        write_json(
            folder / "adapter_config.json",
            config
            | {
                "base_model_name_or_path": str(self.source),
                # In full: LLaDA calls two kinds of matrices ff_out.
                "target_modules": sorted(modules),
            },
        )


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
    source = model_folder(str(folder))
    if dtype is None:
        dtype = "float32" if device.startswith("cpu") else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {' or '.join(DTYPES)}, not {dtype!r}")
    # What is trained is kept in float32, small steps being lost in less; what is not,
    # as it is stored, if that is computed in anyway.
    keep = lora_rank is not None and dtype != "float32"
    network, defaults = _load(source, None if keep else torch.float32)
    if lora_rank is not None:
        lora.add_adapter(
            network,
            lora_rank,
            targets=lora_targets,
            alpha=lora_alpha,
            dropout=lora_dropout,
        )
    try:
        place = torch.device(device)
        network.to(place)
    except (RuntimeError, AssertionError) as error:
        # PyTorch asserts that it was built for a device.
        raise ValueError(f"device {device!r} cannot be used: {error}") from error
    register_tokenizers()
    tokenizer = load_tokenizer(str(source), _config(source))
    end_id = Config(source).values.get("eos_token_id")
    if not isinstance(end_id, int):
        end_id = tokenizer.eos_token_id
    return Learner(
        network=network.train(),
        mask_id=defaults.mask_token_id,
        end_id=int(end_id),
        shift=bool(defaults.shift),
        attention_block=getattr(network, "attention_block", None),
        tokenizer=tokenizer,
        device=place,
        source=source,
        compute_dtype=DTYPES[dtype],
    )


def model_folder(model: str, fetched: Sequence[str] = FETCHED) -> Path:
    """The folder of a model; one of the hub is fetched, if the cache does not have it.

    Args:
        model: Folder, hub id or alias.
        fetched: Patterns of the files that are fetched.

    Raises:
        ValueError: there is no such folder, and the hub has or gives none.
    """
    found = resolve(model)
    folder = found
    if not os.path.isdir(found):
        from huggingface_hub import snapshot_download

        try:
            folder = cached_folder(found) or snapshot_download(
                found, allow_patterns=list(fetched)
            )
        except Exception as error:  # of the hub's client and of its network
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"model {model}: there is no such folder, and the hub does not give it "
                f"({reason})"
            ) from error
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model {model}: {folder} has no config.json")
    return Path(folder)


def trainable(source: Path) -> tuple[str, PretrainedConfig]:
    """The architecture of a folder that can be trained, and its configuration.

    Raises:
        ValueError: it is none of `LAYOUTS`, or does not say what is needed.
    """
    named = Config(source).values.get("architectures")
    known = [name for name in LAYOUTS if isinstance(named, list) and name in named]
    if not known:
        raise ValueError(
            f"{source} is a model of the architecture {named}; what can be trained: "
            f"{', '.join(LAYOUTS)}"
        )
    return known[0], _config(source)


def _load(source: Path, dtype: torch.dtype | None) -> tuple[Network, ModelDefaults]:
    """The network of a folder, and what its model declares."""
    architecture, config = trainable(source)
    network: Network
    if architecture == "LLaDAModelLM":
        network = load_llada(source, dtype)
    elif architecture == "DreamModel":
        network = DecoderModel(load_decoder(Qwen2ForCausalLM, source, config, dtype))
    else:
        network = load_block_causal(source, dtype)
    return network, ModelDefaults.from_hf_config(config)


def declared(source: Path) -> ModelDefaults:
    """What the model in a folder declares: attention, blocks, ends of its texts."""
    return ModelDefaults.from_hf_config(_config(source))


def _config(source: Path) -> Any:
    """The configuration of a folder, checked."""
    config_class = load(HF_CONFIGS[str(Config(source).values.get("model_type"))])
    config = config_class.from_pretrained(source, name_or_path=str(source))
    check_declarations(config)
    return config
