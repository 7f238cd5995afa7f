# SPDX-License-Identifier: Apache-2.0
"""Whether this CPU computes a quantised checkpoint, seen before the first request.

vLLM picks kernels by the format alone. Those for matrices of 4 bits are missing where
there is no AVX-512. Of two for int8, the one for CPUs with AMX writes bfloat16 or
float16, and ends the process where the model's type is float32; the other, oneDNN's,
adds pairs of products in 16 bits where there is no VNNI: weights beyond 63 overflow,
and texts come from other weights without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform

_WIDTH = 64
"""Rows and columns of the matrix that is tried."""

_INSTEAD = "use the checkpoint as it was before it was quantised, or one in fp8"


def check_quantised(model: nn.Module, dtype: torch.dtype) -> None:
    """Multiply one row with a quantised matrix of each kind that a model has.

    Args:
        model: loaded.
        dtype: what its other parts are computed in.

    Raises:
        ValueError: there is no such kernel here, it takes no such type, or computes
            something else.
    """
    if not current_platform.is_cpu():
        return
    seen = set()
    for module in model.modules():
        if not isinstance(module, LinearBase):
            continue
        method: Any = module.quant_method
        kind = (type(method), type(_kernel_of(module)))
        if isinstance(method, UnquantizedLinearMethod) or kind in seen:
            continue
        seen.add(kind)
        _check_int8(_kernel_of(module), dtype)
        try:
            inputs = getattr(module, "input_size_per_partition", module.input_size)
            method.apply(module, torch.ones(1, inputs, dtype=dtype))
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"vLLM has no kernel for this quantised checkpoint on this CPU "
                f"({error}): {_INSTEAD}"
            ) from error


def _kernel_of(module: Any) -> Any:
    return getattr(getattr(module, "scheme", None), "kernel", None)


def _check_int8(kernel: Any, dtype: torch.dtype) -> None:
    from vllm.model_executor.kernels.linear import CPUInt8ScaledMMLinearKernel

    if not isinstance(kernel, CPUInt8ScaledMMLinearKernel):
        return
    if kernel.linear_method == kernel._apply_weights_sgl:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                "int8 weights and activations are not multiplied for a model in "
                f"{str(dtype).removeprefix('torch.')} on this CPU: pass --dtype "
                "bfloat16"
            )
    elif not onednn_is_exact():
        raise ValueError(
            "products of int8 weights and activations overflow on this CPU, which has "
            f"no VNNI: {_INSTEAD}"
        )


def onednn_is_exact() -> bool:
    """Whether oneDNN multiplies the largest numbers of 8 bits without an overflow."""
    from vllm import _custom_ops as ops

    weight = torch.full((_WIDTH, _WIDTH), 127, dtype=torch.int8)
    scale = torch.ones(_WIDTH, 1)
    handler = ops.create_onednn_scaled_mm(
        weight.t(), scale, torch.float32, True, False, 32
    )
    rows, row_scale, _ = ops.onednn_scaled_int8_quant(torch.ones(1, _WIDTH))
    output = torch.empty(1, _WIDTH)
    sums: Tensor = weight.t().sum(dim=0, keepdim=True, dtype=torch.float32)
    ops.onednn_scaled_mm(handler, rows, output, row_scale, None, sums, None)
    wanted = torch.full_like(output, 127.0 * _WIDTH)
    return bool(torch.allclose(output, wanted, rtol=0.01))
