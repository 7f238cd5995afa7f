# SPDX-License-Identifier: Apache-2.0
"""Experts shared out between ranks (`--enable-expert-parallel`), on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.patches.ledger import Where, apply, entries, patch

if TYPE_CHECKING:
    import torch


@patch(
    "vllm.model_executor.layers.fused_moe.modular_kernel:"
    "FusedMoEKernelModularImpl._fused_experts",
    why=(
        "The kernels of a CPU take no map of experts: they look for the experts of all "
        "ranks among those of one, and read behind its weights."
    ),
    upstream="docs/upstream.md#experts-that-are-shared-out-end-a-cpu-engine",
    drop_when="tests/distributed/test_every_family.py passes without it",
    where=Where.CPU_WORKER,
    mends_vllm=True,
)
def shared_out(original: Callable[..., Any]) -> Callable[..., Any]:
    """Rows go to experts by their numbers on this rank; to those of other ranks with
    weight 0, as to the first one here. Nothing differs where all ranks have all."""

    def compute(self: Any, *args: Any, **named: Any) -> Any:
        if named.get("expert_map") is None:
            return original(self, *args, **named)
        own = named["expert_map"][named["topk_ids"].long()]
        named["topk_ids"] = own.clamp(min=0).to(named["topk_ids"].dtype)
        named["topk_weights"] = named["topk_weights"].masked_fill(own < 0, 0)
        named["expert_map"] = None
        found: torch.Tensor = original(self, *args, **named)
        if named["apply_router_weight_on_input"]:  # one expert a row, not weighed here
            found.masked_fill_(own < 0, 0)
        return found

    return compute


def apply_expert_patches() -> None:
    """Call it in a worker, before its model."""
    apply(entries(__name__, Where.CPU_WORKER))
