# SPDX-License-Identifier: Apache-2.0
"""Which matrices may have an adapter, and that no part of one is left out in silence.

vLLM drops matrices of an adapter that it finds no place for, and its requests get the
base model. Embeddings and the head have none of ours (`DiffusionModelMixin`), nor have
routers, whose classes our models look into; experts have none on a CPU, where vLLM has
no kernel for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_dlm.messages import bounded
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.model_manager import LoRAModelManager

BESIDE_EXPERTS = [
    *("qkv_proj", "o_proj"),
    *("query_key_value", "dense"),
    *("gate_up_proj", "down_proj"),
]
"""vLLM's names of the matrices of a mixture of experts, but for routers and experts:
attention, layers without experts, experts that every row has."""

SHOWN = 4
"""Names in a message; more are counted."""


def choose_targets(vllm_config: VllmConfig) -> None:
    """Say which modules get places for adapters; for the config hook.

    Raises:
        ValueError: the user asked for places that cannot be.
    """
    lora = vllm_config.lora_config
    if lora is None:
        return
    if not getattr(vllm_config.model_config.hf_config, "num_experts", 0):
        return
    on_cpu = current_platform.is_cpu()
    if lora.target_modules is None:
        lora.target_modules = [*BESIDE_EXPERTS, *([] if on_cpu else ["experts"])]
        return
    barred = ("gate", "experts") if on_cpu else ("gate",)
    for name in lora.target_modules:
        if name.rpartition(".")[2] in barred:
            raise ValueError(
                f"--lora-target-modules {name}: routers have no places for adapters, "
                "and experts have none on a CPU; leave it out"
            )


@contextmanager
def building_experts(vllm_config: VllmConfig) -> Iterator[None]:
    """While a model is built: experts that no adapter reaches are built as without any.

    vLLM gives experts a Triton kernel wherever adapters are on, and a CPU has none.
    """
    lora = vllm_config.lora_config
    has_places = lora is None or _reaches_experts(lora.target_modules)
    if has_places or not current_platform.is_cpu():
        yield
        return
    vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = lora


def _reaches_experts(targets: list[str] | None) -> bool:
    return targets is None or any(name.endswith("experts") for name in targets)


def refuse_unplaced(manager: LoRAModelManager) -> None:
    """Let a worker's manager refuse adapters of which a part has no place."""
    add = manager._add_adapter

    def add_whole(adapter: Any) -> None:
        places = set(manager.modules).union(*manager.packed_modules.values())
        left = sorted(set(adapter.loras) - places)
        if left:
            shown = ", ".join(left[:SHOWN])
            more = f", ... ({len(left)} in all)" if len(left) > SHOWN else ""
            raise ValueError(
                bounded(
                    f"the adapter has matrices for {shown}{more}, and this engine has "
                    "no place for them: routers have none, on a CPU experts neither, "
                    "nor has what --lora-target-modules leaves out"
                )
            )
        add(adapter)

    replace(manager, "_add_adapter", add_whole)
