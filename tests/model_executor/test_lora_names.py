# SPDX-License-Identifier: Apache-2.0
"""Adapters by the names of each family's own checkpoints, without an engine.

Every matrix finds its place and does there what it should; what has none is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import ALL, write
from reference.adapters import write_adapter
from torch import Tensor
from vllm.model_executor.models.utils import WeightsMapper

from vllm_dlm.model_executor.lora.targets import refuse_unplaced

SCALE = 6.0 / 4


def manager_of(model: Any) -> Any:
    """What a worker has of vLLM's for adapters."""
    from vllm.config import get_current_vllm_config
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    worker = LRUCacheWorkerLoRAManager(
        get_current_vllm_config(), torch.device("cpu"), model.embedding_modules
    )
    worker.create_lora_manager(model, get_current_vllm_config())
    refuse_unplaced(worker._adapter_manager)
    return worker


def request(folder: Path, number: int = 1) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"adapter-{number}", number, str(folder))


def set_rows(manager: Any, adapters: list[int]) -> None:
    from vllm.lora.layers import LoRAMapping

    mapping = LoRAMapping(tuple(adapters), tuple(adapters), is_prefill=True)
    manager.set_adapter_mapping(mapping)


@pytest.mark.parametrize("family", ALL)
def test_every_matrix_finds_its_place(build, tmp_path: Path, family: str):
    base = write(family, tmp_path)
    pairs = write_adapter(tmp_path / "adapter", base, seed=1)
    assert len(pairs) >= 8
    model = build(base, enable_lora=True, max_lora_rank=8)
    mapper = getattr(model, "hf_to_vllm_mapper", WeightsMapper()).get_rename_mapper()
    wanted = {mapper.map_name(name): pair for name, pair in pairs.items()}
    worker = manager_of(model)
    manager = worker._adapter_manager
    assert worker.add_adapter(request(tmp_path / "adapter"))
    set_rows(manager, [1, 0, 1])
    placed = set()
    for name, module in manager.modules.items():
        parent, _, last = name.rpartition(".")
        parts = [
            f"{parent}.{part}"
            for part in manager.packed_modules_mapping.get(last, [last])
        ]
        placed.update(parts)
        rows = torch.randn(3, wanted[parts[0]][0].shape[1])
        changes = [change(rows, *wanted[part]) for part in parts]
        output = torch.zeros(3, sum(one.shape[1] for one in changes))
        got = module._apply_lora_to_output(rows, output)
        exact = torch.cat(changes, dim=1)
        exact[1] = 0
        torch.testing.assert_close(got, exact, atol=1e-4, rtol=1e-4)
    assert placed == wanted.keys()


def change(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return SCALE * rows @ a.T @ b.T


REFUSED = (
    r"embed|wte",
    r"lm_head|transformer\.ff_out|head",
    r"\.gate\.",
    r"experts\.0",
)


@pytest.mark.parametrize("family", ["llada", "nemotron", "llada2", "sdar_moe"])
def test_what_has_no_place(build, tmp_path: Path, family: str):
    """Embeddings, heads, routers; experts on a CPU."""
    base = write(family, tmp_path)
    worker = manager_of(build(base, enable_lora=True, max_lora_rank=8))
    tried = 0
    for number, pattern in enumerate(REFUSED, 1):
        folder = tmp_path / str(number)
        has = re.compile(pattern).search
        if write_adapter(folder, base, seed=1, has=lambda n, has=has: bool(has(n))):
            with pytest.raises(ValueError, match="no place|expected target modules"):
                worker.add_adapter(request(folder, number))
            tried += 1
    assert tried == (4 if "moe" in family or "2" in family else 2)
    assert not worker.list_adapters()


def test_places_that_cannot_be(tmp_path: Path):
    from vllm.engine.arg_utils import EngineArgs

    base = write("sdar_moe", tmp_path)
    for name in ("gate", "experts", "model.layers.0.mlp.gate"):
        with pytest.raises(ValueError, match=f"--lora-target-modules {name}: routers"):
            EngineArgs(
                str(base),
                dtype="float32",
                enable_lora=True,
                lora_target_modules=["q_proj", name],
            ).create_engine_config()
