# SPDX-License-Identifier: Apache-2.0
"""Which tensors a model needs, and whether a checkpoint has these and no others.

vLLM's loaders fill a fused parameter from parts, and do not notice a part that never
comes, one that nobody asked for among experts, or one that is larger than its place. So
the names and shapes that a model needs are derived from its modules, and compared with
what the files have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.model_executor.models.experts import unstacked

Shape = tuple[int, ...] | None
"""That of a tensor as files have it, for all ranks; None for any."""

HARMLESS = re.compile(
    r"(^|\.)("
    r"rotary_(pos_)?emb\.inv_freq|rotary_emb\.(original_inv_freq|cos_cached|sin_cached)"
    r"|position_ids|attn\.masked_bias"
    r")$"
)
"""Left-over tensors that say nothing: tables that are computed anew."""

ESSENTIAL = {
    "weight",
    "bias",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "input_scale",
    "qweight",
    "scales",
}
"""Parameters that no quantisation makes up itself."""

SHOWN = 8
"""Names in a message; more are counted."""


def expected_tensors(model: nn.Module) -> dict[str, Shape]:
    """Tensors that `model` is made of, under vLLM's names, unfused, for all ranks."""
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    expected: dict[str, Shape] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {
            field: parameter
            for field, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in seen
        }
        seen.update(map(id, own.values()))
        own = {field: own[field] for field in own if _is_read(module, field, own)}
        if _are_experts(module):
            expected.update(
                _of_experts(name.removesuffix(".routed_experts"), module, own)
            )
        elif isinstance(module, LinearBase):
            expected.update(_of_linear(name, module, own, packed))
        elif isinstance(module, VocabParallelEmbedding):
            expected.update(_of_embedding(name, module, own))
        else:
            for field, parameter in own.items():
                expected[f"{name}.{field}"] = tuple(parameter.shape)
    return expected


def _is_read(module: Any, field: str, own: Mapping[str, nn.Parameter]) -> bool:
    """Whether a parameter is filled from a checkpoint at all."""
    method = getattr(module, "quant_method", None)
    if getattr(method, "uses_meta_device", False):
        # Quantised while it is loaded: what comes is the weight as it was.
        return field.removeprefix("w13_").removeprefix("w2_") in ("weight", "bias")
    return own[field].numel() > 0 and not isinstance(method, BaseKVCacheMethod)


def _are_experts(module: Any) -> bool:
    return hasattr(module, "ckpt_gate_proj_name") and hasattr(module, "moe_config")


def _of_linear(
    name: str,
    module: Any,
    own: Mapping[str, nn.Parameter],
    packed: Mapping[str, list[str]],
) -> Iterator[tuple[str, Shape]]:
    parent, _, last = name.rpartition(".")
    parts = packed.get(last) or [last]
    sizes = _row_counts(module) if len(parts) > 1 else [sum(_row_counts(module))]
    is_plain = isinstance(module.quant_method, UnquantizedLinearMethod)
    for part, rows in zip(parts, sizes, strict=True):
        for field, parameter in own.items():
            shape: Shape = None
            if field == "weight" and is_plain:
                shape = (rows, module.input_size)
            elif field == "bias":
                shape = (rows,)
            elif is_plain:  # a parameter that the layer was given besides
                shape = tuple(parameter.shape)
            yield ".".join(filter(None, (parent, part, field))), shape


def _row_counts(module: Any) -> list[int]:
    """Rows of each part of a linear layer's weight, on all ranks together."""
    if isinstance(module, QKVParallelLinear):
        # Not its output_sizes, which count keys and values that ranks repeat.
        return [
            module.total_num_heads * module.head_size,
            module.total_num_kv_heads * module.head_size,
            module.total_num_kv_heads * module.v_head_size,
        ]
    sizes = getattr(module, "output_sizes", None)
    return list(sizes) if sizes else [module.output_size]


def _of_embedding(
    name: str, module: Any, own: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Shape]]:
    is_plain = isinstance(module.quant_method, UnquantizedEmbeddingMethod)
    whole = (module.org_vocab_size, module.embedding_dim)
    for field in own:
        shape = whole[:1] if field == "bias" else whole
        yield f"{name}.{field}", shape if is_plain else None


def _of_experts(
    name: str, module: Any, own: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Shape]]:
    config = module.moe_config
    hidden = config.hidden_dim_unpadded or config.hidden_dim
    inner = config.intermediate_size
    is_plain = isinstance(module.quant_method, UnquantizedFusedMoEMethod)
    parts = {
        "w13": (module.ckpt_gate_proj_name, module.ckpt_up_proj_name),
        "w2": (module.ckpt_down_proj_name,),
    }
    for field in own:
        place, _, kind = field.partition("_")
        shape = (inner, hidden) if place == "w13" else (hidden, inner)
        for number in range(config.num_logical_experts):
            for part in parts.get(place, ()):
                fits = shape if kind == "weight" and is_plain else None
                yield f"{name}.{number}.{part}.{kind}", fits


def _of_other_ranks(model: nn.Module) -> Iterator[str]:
    """Prefixes of the experts that other ranks hold, and vLLM may not even read."""
    for name, module in model.named_modules():
        if not _are_experts(module):
            continue
        config, places = module.moe_config, module.expert_map
        # Which copy of a repeated expert is where changes: all are read then.
        if places is None or config.num_experts != config.num_logical_experts:
            continue
        for number in range(config.num_logical_experts):
            if int(places[number]) < 0:
                yield f"{name.removesuffix('.routed_experts')}.{number}."


class WeightCheck:
    """Watches a checkpoint's tensors go by, and says afterwards what was wrong."""

    def __init__(self, model: Any) -> None:
        """Note what `model`, one of our classes, needs."""
        config = model.config
        names = config.family.module_names
        modules = names.modules(config.num_hidden_layers) if names else {}
        self.family = config.family.name
        self._last = ""
        """The tensor that was handed on last, under its name in the file."""
        self._file_names = {ours: theirs for theirs, ours in modules.items()}
        self._expected = expected_tensors(model)
        self._elsewhere = tuple(_of_other_ranks(model))
        self._modules = {name.rpartition(".")[0] for name in self._expected}
        self._mapper = model.names_in_files or WeightsMapper()
        quantisation = getattr(model, "quant_config", None)
        self._is_quantised = quantisation is not None
        if quantisation is not None:
            self._mapper |= quantisation.get_cache_scale_mapper()
            self._mapper |= quantisation.get_checkpoint_weight_mapper()
        self._found: set[str] = set()
        self._left_over: list[str] = []
        self._misshapen: list[str] = []
        # A head of its own where the embedding is the head, and the embedding.
        self._head: tuple[str, torch.Tensor] | None = None
        self._embedding: torch.Tensor | None = None

    def used(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of `weights` that the model has a place for, stacks taken apart."""
        for name, tensor in weights:
            parts = unstacked(name, tensor)
            for part, piece in parts or ((name, tensor),):
                if self._has_place(part, piece, name):
                    self._last = name
                    yield part, piece

    def _has_place(self, name: str, tensor: torch.Tensor, file_name: str) -> bool:
        ours = self._mapper.map_name(name)
        if ours is None or HARMLESS.search(name):
            return False
        if ours in self._expected:
            return self._fits(ours, tensor, file_name)
        module, _, field = ours.rpartition(".")
        if ours == "lm_head.weight":
            self._head = (file_name, tensor)
            return False
        if field == "bias" and not tensor.any():
            # GPTQ's files have such for layers that have none.
            return False
        if self._is_quantised and module in self._modules and field not in ESSENTIAL:
            return True
        if file_name not in self._left_over[-1:]:
            self._left_over.append(file_name)
        return False

    def _fits(self, ours: str, tensor: torch.Tensor, file_name: str) -> bool:
        self._found.add(ours)
        shape = self._expected[ours]
        if shape is not None and tuple(tensor.shape) != shape:
            self._misshapen.append(
                f"{file_name} ({list(tensor.shape)} where config.json has "
                f"{list(shape)})"
            )
            return False
        if ours in ("model.embed_tokens.weight", "model.word_embeddings.weight"):
            self._embedding = tensor
        return True

    @contextmanager
    def naming_tensors(self) -> Iterator[None]:
        """Say of errors inside which tensor they are about."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, KeyError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"the tensor {self._last} does not fit into this {self.family} model: "
                f"{type(error).__name__} {' '.join(str(error).split())}"
            ) from error

    def finish(self) -> None:
        """Say what was wrong, once all tensors have gone by.

        Raises:
            ValueError: tensors are missing, left over, or of another shape.
        """
        missing = self._missing()
        if self._head is not None:
            name, head = self._head
            if self._embedding is None or not torch.equal(head, self._embedding):
                self._left_over.append(
                    f"{name} (config.json has tie_word_embeddings true, and it is not "
                    "the embedding)"
                )
        lists = {
            "missing": list(map(self._in_file, missing)),
            "left over": self._left_over,
            "of another shape": self._misshapen,
        }
        found = [
            f"{kind}: {_shortened(names)}" for kind, names in lists.items() if names
        ]
        if found:
            raise ValueError(
                f"the checkpoint's tensors are not those of this {self.family} model. "
                + "; ".join(found)
            )

    def _missing(self) -> list[str]:
        # What no layer has, quantisation makes itself, or does without.
        fields = ESSENTIAL | {name.rpartition(".")[2] for name in self._found}
        return [
            name
            for name, shape in self._expected.items()
            if name not in self._found
            and not name.startswith(self._elsewhere)
            and (shape is not None or name.rpartition(".")[2] in fields)
        ]

    def _in_file(self, name: str) -> str:
        module, _, field = name.rpartition(".")
        return f"{self._file_names.get(module, module)}.{field}"


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"
