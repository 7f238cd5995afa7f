# SPDX-License-Identifier: Apache-2.0
"""How much memory a training needs, told without weights and without a GPU.

The network is built from its config.json, of tensors that have a shape and no memory
(FakeTensor). A row is sent through it, and what autograd would keep for the backward
pass is counted, as PyTorch says it: no formula for a family of networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_dlm.training import lora
from vllm_dlm.training.distributed import layers_of

GIB = 1 << 30
LENGTHS = (384, 1024, 2048, 4096)
GPUS = (24, 40, 80)
"""GiB of the GPUs that the table speaks of."""
RESERVED = 1.5 * GIB
"""Of a GPU: CUDA's context, kernels' workspaces, what the allocator cannot use."""
_TRACED = (32, 64)
"""Tokens of the rows that are sent through: what they keep grows with a row's length,
but for copies of an adapter's weights."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training, on one GPU.

    Args:
        parameters: Of the network, without an adapter.
        trained: Parameters that are trained.
        weights: Bytes of the weights that are not trained.
        states: Bytes of what is trained, its gradients and AdamW's two moments.
        copies: Bytes of copies of weights, in another type, that a forward keeps.
        shared: Bytes of a layer's weights, and of embedding and head, that every
            process fetches where the weights are split over several.
        head: Bytes of the logits of a masked token, forwards and backwards.
        token: Bytes that a token keeps for the backward pass.
        token_again: The same with --checkpointing: each layer's input.
        layer: Bytes that a token keeps of one layer: while a layer is computed again.
    """

    parameters: int
    trained: int
    weights: int
    states: int
    copies: float
    shared: int
    head: float
    token: float
    token_again: float
    layer: float

    def activations(self, tokens: int, checkpointing: bool, forwards: int = 1) -> float:
        """Bytes that tokens keep.

        Args:
            tokens: Of all rows that are computed at once.
            checkpointing: Whether layers are computed again.
            forwards: With a backward pass in common.
        """
        if checkpointing:
            return tokens * (forwards * self.token_again + self.layer)
        return tokens * forwards * self.token

    def fixed(self, processes: int = 1) -> float:
        """Bytes that any row needs, where weights are split over so many processes."""
        if processes == 1 or self.weights:
            return self.weights + self.states + self.copies
        return self.states / processes + self.shared

    def rows(
        self,
        gpu: int,
        length: int,
        masked: int,
        checkpointing: bool,
        forwards: int = 1,
        processes: int = 1,
    ) -> int:
        """Most rows at once.

        Args:
            gpu: GiB of each GPU.
            length: Tokens of a row.
            masked: Tokens of a row that go through the head.
            checkpointing: As of `activations`.
            forwards: As of `activations`.
            processes: GPUs.
        """
        left = gpu * GIB - RESERVED - self.fixed(processes)
        row = self.activations(length, checkpointing, forwards)
        row += masked * forwards * self.head
        return max(0, int(left / row))


def estimate(
    network: nn.Module,
    lora_rank: int | None = None,
    lora_targets: str = "all",
    dtype: torch.dtype = torch.bfloat16,
) -> Estimate:
    """What training a network needs.

    Args:
        network: On the meta device; has `hidden` and `head`. It is changed.
        lora_rank: Rank of an adapter; None trains all weights.
        lora_targets: As of `lora.target_modules`.
        dtype: Type that is computed in; weights that are not trained have it too.
    """
    parameters = sum(each.numel() for each in network.parameters())
    if lora_rank is not None:
        with torch.device("meta"):
            lora.add_adapter(network, lora_rank, targets=lora_targets)
    for parameter in network.parameters():
        if lora_rank is None or not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    frozen = sum(each.numel() for each in network.parameters()) - trained
    layers = layers_of(network)
    layer = sum(each.numel() for each in layers[0].parameters())
    outside = parameters - len(layers) * layer if lora_rank is None else 0
    size = dtype.itemsize
    _become_fake(network)
    # FSDP2 fetches weights in the type that is computed in; alone, they are copied.
    copied = trained * size if lora_rank is None and size < 4 else 0
    few, many = (_trace(network, layers, dtype, tokens) for tokens in _TRACED)
    per_token = {
        name: (many[name] - few[name]) / (_TRACED[1] - _TRACED[0]) for name in few
    }
    return Estimate(
        parameters=parameters,
        trained=trained,
        weights=frozen * size,
        # The trained weights, their gradients and two moments, in float32; and what a
        # forward keeps of the weights, in the type that is computed in.
        states=trained * 16,
        copies=copied + few["row"] - per_token["row"] * _TRACED[0],
        # Two layers: the next one's weights come while one is computed.
        shared=(2 * layer + outside) * size if lora_rank is None else 0,
        head=per_token["head"],
        token=per_token["row"],
        token_again=per_token["inputs"],
        layer=per_token["layer"],
    )


def build(folder: str | Path) -> Any:
    """The network of a folder, of its config.json alone, on the meta device.

    Raises:
        ValueError: its layout is none that can be trained, or a size is missing.
    """
    from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

    from vllm_dlm.files.model_folders import Config
    from vllm_dlm.training.block_causal import BlockCausalModel
    from vllm_dlm.training.decoders import DecoderModel
    from vllm_dlm.training.learner import trainable
    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, read_shape

    architecture, config = trainable(Path(folder))
    with torch.device("meta"):
        if architecture == "LLaDAModelLM":
            return LLaDAModel(read_shape(Config(folder)))
        if architecture == "DreamModel":
            return DecoderModel(Qwen2ForCausalLM(config))
        return BlockCausalModel(Qwen3ForCausalLM(config))


def report(
    found: Estimate,
    *,
    dtype: torch.dtype,
    masked: int,
    forwards: int,
    lengths: Sequence[int] = LENGTHS,
    processes: Sequence[int] = (1, 2, 4, 8),
) -> str:
    """The estimate in words and tables.

    Args:
        found: The estimate.
        dtype: As of `estimate`.
        masked: Most tokens of a row that go through the head.
        forwards: Forwards of a step that have a backward pass in common.
        lengths: Tokens of a row, a line of the tables each.
        processes: GPUs that the tables speak of, where all weights are trained.
    """

    def gib(size: float) -> str:
        return f"{size / GIB:.2f}"

    adapter = found.weights > 0
    name = str(dtype).removeprefix("torch.")
    lines = [
        f"{found.parameters:,} parameters, {found.trained:,} of "
        + ("an adapter trained" if adapter else "them trained"),
        "",
        "GiB, whatever the rows",
    ]
    if adapter:
        lines.append(f"{gib(found.weights):>10}  weights, {name}, not trained")
    part = found.states / 4
    lines += [
        f"{gib(part):>10}  {'adapter' if adapter else 'weights'}, float32",
        f"{gib(part):>10}  gradients, float32",
        f"{gib(2 * part):>10}  AdamW's moments, float32",
        f"{gib(found.copies):>10}  copies of the same, {name}",
        f"{gib(found.fixed()):>10}  together",
    ]
    if not adapter:
        lines += [
            f"{gib(found.fixed(count)):>10}  on each of {count} GPUs, with the weights "
            "of two layers, embedding and head"
            for count in processes[1:]
        ]
    passes = "" if forwards == 1 else f", {forwards} forwards of a step"
    lines += [
        "",
        f"GiB of one row{passes}; logits of at most {masked} masked tokens",
        "    tokens  activations  with --checkpointing  logits",
    ]
    for length in lengths:
        whole, again = (
            found.activations(length, checkpointing, forwards)
            for checkpointing in (False, True)
        )
        logits = min(masked, length) * forwards * found.head
        lines.append(f"{length:10,}{gib(whole):>13}{gib(again):>22}{gib(logits):>8}")
    lines += [
        "",
        "Most rows at once on each GPU (--batch-size / --accumulate / GPUs), without",
        "and with --checkpointing; 0: it does not fit",
        "  GPUs    tokens  " + "".join(f"{f'{gpu} GiB':>18}" for gpu in GPUS),
    ]
    # An adapter's weights are not split: more GPUs have the same room.
    for count in processes[:1] if adapter else processes:
        for length in lengths:
            cells = ""
            for gpu in GPUS:
                least = min(masked, length)
                without, again = (
                    found.rows(gpu, length, least, checkpointing, forwards, count)
                    for checkpointing in (False, True)
                )
                cells += f"{f'{without:,} / {again:,}':>18}"
            lines.append(f"{count:6}{length:10,}  {cells}")
    return "\n".join(lines)


def _trace(
    network: Any, layers: Sequence[nn.Module], dtype: torch.dtype, tokens: int
) -> dict[str, float]:
    """Bytes that autograd keeps of one row, all of whose tokens are masked.

    "row": of all layers; "layer": of the one that keeps most; "inputs": what the layers
    are given; "head": of the logits, forwards and backwards.
    """
    # Not in training: attention is then SDPA's, which keeps no scores, as on a GPU.
    network.eval()
    own = {
        each.untyped_storage()._cdata
        for each in (*network.parameters(), *network.buffers())
    }
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor
        return tensor

    def total() -> int:
        return sum(each.untyped_storage().nbytes() for each in kept.values())

    begun: list[int] = []
    of_layers: list[int] = []
    inputs: list[Tensor] = []

    def before(module: nn.Module, given: Any, named: Any) -> None:
        begun.append(total())
        inputs.append(given[0] if given else named["hidden_states"])

    def after(*_: Any) -> None:
        of_layers.append(total() - begun[-1])

    handles = []
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))
    mode = next(network.parameters()).fake_mode
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    casts = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with mode, casts, hooks:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="cpu")
        hidden = network.hidden(ids)
        row = total()
        logits = network.head(hidden[0]).float()
        F.cross_entropy(logits, ids[0])
    # Backwards, the gradient of the logits and its copy of `dtype` come on top.
    head = total() - row + logits.numel() * (4 + dtype.itemsize)
    for handle in handles:
        handle.remove()
    return {
        "row": row,
        "layer": max(of_layers),
        "head": head,
        "inputs": sum(each.numel() * each.element_size() for each in inputs),
    }


def _become_fake(network: nn.Module) -> None:
    """Let tensors of the meta device be ones of a CPU, still without memory."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode = FakeTensorMode()
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = FakeTensor(mode, parameter.data.to("meta"), torch.device("cpu"))
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                fake = FakeTensor(mode, buffer.to("meta"), torch.device("cpu"))
                module._buffers[name] = fake
