# SPDX-License-Identifier: Apache-2.0
"""A training step of rows of different lengths: padded, packed, and computed twice.

A slice of LLaDA-8B, a few layers of its widths, with random weights and an adapter. The
same rows give the same loss in every way; time and memory are what differs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from benchmarks.gpu.findings import Findings, has_cuda


@dataclass(frozen=True)
class Size:
    """A network and its rows."""

    vocab_size: int
    d_model: int
    n_heads: int
    mlp_hidden_size: int
    layers: int
    rank: int
    rows: int
    longest: int


SIZES = {
    True: Size(126_464, 4096, 32, 12_288, layers=4, rank=128, rows=16, longest=1024),
    False: Size(2048, 128, 4, 384, layers=3, rank=8, rows=16, longest=128),
}
"""With CUDA and without."""
MASKED = 0.15
"""Share of the tokens that go through the head."""


@dataclass(frozen=True)
class Way:
    """How the rows are computed."""

    name: str
    packed: bool
    xformers: bool = False
    checkpointing: bool = False


WAYS = (
    Way("padded", packed=False),
    Way("padded, --checkpointing", packed=False, checkpointing=True),
    Way("packed, SDPA with a mask", packed=True),
    Way("packed, xformers", packed=True, xformers=True),
)


def run_training(findings: Findings, *, quick: bool) -> None:
    """Time and memory of a step, each way; and the memory that a dry run tells."""
    import torch

    from vllm_dlm.training import lora, memory, packing
    from vllm_dlm.training.attention import has_xformers
    from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, LLaDAShape

    size = SIZES[has_cuda()]
    device = torch.device("cuda" if has_cuda() else "cpu")
    dtype = torch.bfloat16 if has_cuda() else torch.float32
    shape = LLaDAShape(
        vocab_size=size.vocab_size,
        d_model=size.d_model,
        n_layers=size.layers,
        n_heads=size.n_heads,
        mlp_hidden_size=size.mlp_hidden_size,
        max_sequence_length=size.longest,
    )
    with torch.device("meta"):
        without_memory = LLaDAModel(shape)
    told = memory.estimate(without_memory, size.rank, dtype=dtype)
    torch.manual_seed(0)
    with torch.device(device):
        network: Any = LLaDAModel(shape).to(device)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        lora.add_adapter(network, size.rank)
    network.train()
    drawn = random.Random(1)
    lengths = [
        drawn.randint(size.longest // 16, size.longest) for _ in range(size.rows)
    ]
    lengths[0] = size.longest
    ids = torch.randint(size.vocab_size, (size.rows, size.longest), device=device)
    ends = torch.tensor(lengths, device=device)[:, None]
    valid = torch.arange(size.longest, device=device) < ends
    where = valid & (torch.rand(ids.shape, device=device) < MASKED)
    share = sum(lengths) / ids.numel()
    findings.add(
        "rows", f"{size.rows} of at most {size.longest}, {share:.0%} of it text"
    )

    def step(way: Way) -> float:
        network.zero_grad()
        network.checkpointing = way.checkpointing
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = packing.hidden_at(
                network, ids, valid, where, packed=way.packed, dtype=dtype
            )
            logits = network.head(hidden).float()
        loss = torch.nn.functional.cross_entropy(logits, ids[where])
        loss.backward()
        return loss.item()

    head_dim = size.d_model // size.n_heads
    first: tuple[float, float] | None = None
    for way in WAYS[::2] if quick else WAYS:
        if way.xformers and not has_xformers(device, dtype, head_dim):
            reason = "it is not installed, or has no kernel for this device"
            findings.add(way.name, f"not done: {reason}")
            continue
        with _xformers(packing, way.xformers):
            loss = step(way)
            seconds = min(_seconds(lambda way=way: step(way)) for _ in range(5))
            peak = _peak(lambda way=way: step(way))
        first = first or (seconds, loss)
        note = "" if peak is None else f", {peak / 2**30:.2f} GiB at most"
        findings.add(
            way.name,
            f"{seconds * 1e3:.1f} ms, {first[0] / seconds:.2f} x as fast as padded"
            f"{note}, loss {loss:.4f}",
            **{way.name: {"seconds": seconds, "bytes": peak, "loss": loss}},
        )
        if abs(loss - first[1]) > (0.02 if has_cuda() else 1e-4) * first[1]:
            findings.problem = f"{way.name}: the loss is {loss}, padded {first[1]}"
    tokens = ids.numel()
    kept = (
        told.weights + told.states / 2 + told.copies + told.activations(tokens, False)
    )
    kept += int(where.sum()) * told.head
    findings.add(
        "padded, as a dry run tells it, without AdamW",
        f"{kept / 2**30:.2f} GiB",
        told_bytes=kept,
    )


@contextmanager
def _xformers(packing: Any, on: bool) -> Iterator[None]:
    """Let rows be packed for xformers, or not."""
    with patch.object(packing, "has_xformers", lambda *_: on):
        yield


def _seconds(function: Any) -> float:
    import torch

    began = time.perf_counter()
    function()
    if has_cuda():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _peak(function: Any) -> int | None:
    """Most bytes that the device had in use, where it counts them."""
    import torch

    if not has_cuda():
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated()
