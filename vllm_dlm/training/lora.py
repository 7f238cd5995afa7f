# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) inside our networks, through peft.

W x + (alpha / r) B A x, with W frozen. The head and the embeddings never get one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

TARGETS = ("reference", "all")
_REFERENCE = {
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}
"""What the published recipes name. LLaDA calls four of these otherwise or has none of
them, so that only its q_proj, k_proj, v_proj and up_proj get an adapter."""
_LAYER = re.compile(r"\.(?:blocks|layers)\.\d+\.")


def target_modules(network: nn.Module, targets: str) -> list[str]:
    """Names of the matrices that get an adapter.

    Args:
        network: Its layers' names contain ".blocks." or ".layers.".
        targets: "reference": what the published code's list of names matches; "all":
            every matrix of the layers.

    Raises:
        ValueError: `targets` is neither.
    """
    if targets not in TARGETS:
        raise ValueError(f"LoRA targets are {' or '.join(TARGETS)}, not {targets!r}")
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and _LAYER.search(name)
        and (targets == "all" or name.rpartition(".")[2] in _REFERENCE)
    ]


def add_adapter(
    network: nn.Module,
    rank: int,
    *,
    targets: str = "all",
    alpha: float | None = None,
    dropout: float = 0.0,
) -> None:
    """Put an adapter into a network, in place; only the adapter is trained then.

    Its weights are float32, whatever the network's are. A is drawn by PyTorch's global
    generator, B is 0: the network computes what it did.

    Args:
        network: As of `target_modules`.
        rank: Rank r of the adapter.
        targets: As of `target_modules`.
        alpha: Its scale is alpha / r; by default alpha = r.
        dropout: Share of the adapter's inputs that are left out in training.

    Raises:
        ValueError: a value is out of range, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(
            "adapters need peft: pip install 'vllm-dlm[train]', or train all weights"
        ) from None
    if rank < 1:
        raise ValueError(f"the rank of an adapter is at least 1, not {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a share from 0 to below 1, not {dropout}")
    config = LoraConfig(
        r=rank,
        # peft computes alpha / r in floating point, and only its type says int.
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=target_modules(network, targets),
        lora_dropout=dropout,
    )
    network.requires_grad_(False)
    inject_adapter_in_model(config, network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


@contextmanager
def adapter_off(network: nn.Module) -> Iterator[None]:
    """Compute without the adapter: the network as it was before the training.

    Raises:
        ValueError: the network has no adapter.
    """
    layers = _layers(network)
    if not layers:
        raise ValueError("the network has no adapter to switch off")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def has_adapter(network: nn.Module) -> bool:
    return bool(_layers(network))


def merged_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict with the adapter merged: W + (alpha / r) B A where there is one.

    One tensor at a time: the network stays as it is, and no second one is in memory.
    """
    layers: dict[str, Any] = {
        f"{name}.base_layer.weight": module
        for name, module in network.named_modules()
        if isinstance(module, _layer_class())
    }
    for name, tensor in _stored(network):
        if name in layers:
            change = layers[name].get_delta_weight("default")
            tensor = (tensor.float() + change.float()).to(tensor.dtype)
        yield name.replace(".base_layer.", "."), tensor


def adapter_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapter alone: A as MODULE.lora_A.weight, [r, in]; B likewise, [out, r]."""
    for name, tensor in network.state_dict().items():
        if "lora_" in name:
            yield name.replace(".default.", "."), tensor


def adapter_config(network: nn.Module) -> dict[str, Any]:
    """What peft's adapter_config.json says of it, but for the names of modules.

    Raises:
        ValueError: the network has no adapter.
    """
    layers = _layers(network)
    if not layers:
        raise ValueError("the network has no adapter to write")
    return {
        "peft_type": "LORA",
        "r": layers[0].r["default"],
        "lora_alpha": layers[0].lora_alpha["default"],
        "bias": "none",
    }


def plain_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict without the adapter, by the names of `merged_tensors`."""
    for name, tensor in _stored(network):
        yield name.replace(".base_layer.", "."), tensor


def _stored(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in network.state_dict().items():
        if "lora_" not in name:
            yield name, tensor


def _layers(network: nn.Module) -> list[Any]:
    return [each for each in network.modules() if isinstance(each, _layer_class())]


def _layer_class() -> tuple[type, ...]:
    """peft's class of a layer with an adapter; nothing where peft is missing."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return ()
    return (BaseTunerLayer,)
