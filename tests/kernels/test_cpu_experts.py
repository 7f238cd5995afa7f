# SPDX-License-Identifier: Apache-2.0
"""Experts that two ranks share out, on a CPU: their parts add up to all experts' sum.

An engine with them: tests/distributed/test_every_family.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from vllm_dlm.patches.cpu_experts import shared_out

ROWS, SIZE, INNER, EXPERTS, CHOSEN = 13, 64, 32, 8, 3


@pytest.fixture(scope="module")
def ops() -> Any:
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM's kernel of a CPU")
    return pytest.importorskip("vllm._custom_ops")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_rank(ops: Any, w13: torch.Tensor, w2: torch.Tensor, **named: Any) -> Any:
    """What a rank computes of rows with its experts, by vLLM's kernel and our map."""
    w13, w2 = (ops.cpu_prepack_moe_weight(one.contiguous(), "vec") for one in (w13, w2))

    def kernel(_: Any, **named: Any) -> torch.Tensor:
        assert named["expert_map"] is None
        found = torch.empty_like(named["a1q"])
        chosen = named["topk_weights"], named["topk_ids"]
        is_weighed = named["apply_router_weight_on_input"]
        ops.cpu_fused_moe(
            *(found, named["a1q"], w13, w2, None, None, *chosen, "silu", "vec"),
            is_weighed,
        )
        return found

    return shared_out(kernel)(None, **named)


@pytest.mark.parametrize("chosen", [CHOSEN, 1])
@pytest.mark.parametrize("weighs_input", [False, True])
def test_two_ranks_add_up(ops: Any, chosen: int, weighs_input: bool):
    if weighs_input and chosen > 1:
        pytest.skip("vLLM weighs the input only where a row has one expert")
    rows, w13 = draw(ROWS, SIZE), draw(EXPERTS, 2 * INNER, SIZE) / 8
    w2 = draw(EXPERTS, SIZE, INNER) / 6
    weights, ids = draw(ROWS, EXPERTS).softmax(-1).topk(chosen)
    gate, up = torch.einsum("rs,eis->rei", rows, w13).chunk(2, dim=-1)
    each = torch.einsum("rei,esi->res", silu(gate) * up, w2)
    parts = each.gather(1, ids[..., None].expand(-1, -1, SIZE))
    wanted = (parts if weighs_input else parts * weights[..., None]).sum(1)

    found = torch.zeros_like(rows)
    for mine in (range(5), range(5, EXPERTS)):
        places = torch.full((EXPERTS,), -1, dtype=torch.int32)
        places[mine.start : mine.stop] = torch.arange(len(mine), dtype=torch.int32)
        found += by_rank(
            *(ops, w13[mine.start : mine.stop], w2[mine.start : mine.stop]),
            a1q=rows,
            topk_weights=weights,
            topk_ids=ids.int(),
            expert_map=places,
            apply_router_weight_on_input=weighs_input,
        )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
