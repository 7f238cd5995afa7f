# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints of each format: their matrices are right, or refused by name.

A model is loaded as a worker loads it, without an engine; `tests/engine` has texts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference.llada import write_random_checkpoint
from reference.quantised import FORMATS, quantise
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_dlm.model_executor.cpu_quantised import check_quantised, onednn_is_exact
from vllm_dlm.model_executor.models.llada import LLADA_TO_LLAMA

LEFT = ("model.transformer.blocks.0.ff_out", "model.transformer.ff_out")
"""What is not quantised, as the checkpoint calls it."""

FOUR_BITS = ("w4a16", "gptq", "awq")
FAR = {"fp8": 0.05, "int8": 0.03}
"""Relative; these round activations to 8 bits, the others compute in bfloat16."""


def write(form: str, folder: Path) -> dict[str, Tensor]:
    """A checkpoint; what its matrices stand for, by vLLM's names."""
    write_random_checkpoint(folder, seed=2)
    weights = quantise(
        folder, lambda name: "wte" in name or name in LEFT, list(LEFT), form
    )
    return {
        str(LLADA_TO_LLAMA.map_name(name)): tensor.float()
        for name, tensor in weights.items()
    }


def loaded(build, folder: Path) -> nn.Module:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    model = build(folder, dtype="bfloat16")
    model.load_weights(load_file(folder / "model.safetensors").items())
    model_config = get_current_vllm_config().model_config
    process_weights_after_loading(model, model_config, torch.device("cpu"))
    return model


@pytest.mark.parametrize("form", FORMATS)
def test_each_matrix_or_a_refusal(build, tmp_path: Path, form: str):
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    wanted = write(form, tmp_path)
    model = loaded(build, tmp_path)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, LinearBase)}
    plain = [
        name
        for name, module in linear.items()
        if isinstance(module.quant_method, UnquantizedLinearMethod)
    ]
    assert plain == ["model.layers.0.mlp.down_proj"]
    if form in FOUR_BITS and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        with pytest.raises(ValueError, match=r"no kernel.*cpu_gemm_wna16.*fp8"):
            check_quantised(model, torch.bfloat16)
        return
    has_amx = torch.cpu._is_amx_tile_supported()
    if form == "int8" and not has_amx and not onednn_is_exact():
        with pytest.raises(ValueError, match="overflow on this CPU.*fp8"):
            check_quantised(model, torch.bfloat16)
        return
    if form == "int8" and has_amx:
        with pytest.raises(ValueError, match="pass --dtype bfloat16"):
            check_quantised(model, torch.float32)
    check_quantised(model, torch.bfloat16)
    torch.manual_seed(0)
    for name, module in linear.items():
        parent, _, last = name.rpartition(".")
        parts = model.packed_modules_mapping.get(last, [last])
        weight = torch.cat([wanted[f"{parent}.{part}.weight"] for part in parts])
        rows = torch.randn(9, weight.shape[1]).bfloat16()
        got = module.quant_method.apply(module, rows).float()
        exact = rows.float() @ weight.T
        assert (got - exact).norm() < FAR.get(form, 0.01) * exact.norm(), name


def product(rows: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """By vLLM's kernel, and by plain whole numbers."""
    from vllm import _custom_ops as ops

    handler = ops.create_onednn_scaled_mm(
        weight.t(), scale, torch.float32, True, False, 32
    )
    whole, row_scale, _ = ops.onednn_scaled_int8_quant(rows)
    output = torch.empty(len(rows), len(weight))
    sums = weight.t().sum(dim=0, keepdim=True, dtype=torch.float32) * scale.squeeze()
    ops.onednn_scaled_mm(handler, whole, output, row_scale, None, sums, None)
    exact = (whole.long() @ weight.long().T).double() * row_scale * scale.T
    return output, exact.float()


def test_an_overflow_is_noticed():
    """Random weights of the whole range are computed right where the check says so."""
    torch.manual_seed(0)
    rows, scale = torch.randn(16, 256), torch.rand(96, 1)
    errors = []
    for most in (63, 127):
        weight = torch.randint(-most, most + 1, (96, 256), dtype=torch.int8)
        got, wanted = product(rows, weight, scale)
        errors.append(float((got - wanted).norm() / wanted.norm()))
    assert errors[0] < 1e-5
    assert (errors[1] < 1e-5) == onednn_is_exact()
