# SPDX-License-Identifier: Apache-2.0
"""Whole CUDA graphs without CUDA: vLLM's own manager of them, on a CPU.

vLLM chooses what is captured, prepares each capture, and dispatches every step. Where
it would record kernels, the network's call is kept, with the tensors of the capture;
where it would replay them, that call is made again. As on a GPU, all that a step
prepares is lost, unless it was written into those tensors.

One thing cannot be held so: attention on a CPU splits its work by a schedule, a tensor
that vLLM makes anew in each step. The replay takes the step's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine.harness import Engine
from vllm.config import set_current_vllm_config
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    ModelCudaGraphManager,
)
from vllm.v1.worker.gpu.input_batch import InputBatch

Metadata = dict[str, Any]
"""What attention is told, by the name of the layer."""
Places = dict[tuple[str, str], tuple[int, torch.Size]]
"""Address and shape of each tensor, by the layer and the name of the field."""


def places(metadata: Metadata) -> Places:
    """Where the tensors of a forward's metadata lie, but for a CPU's schedule."""
    return {
        (layer, field): (value.data_ptr(), value.shape)
        for layer, fields in metadata.items()
        for field, value in vars(fields).items()
        if isinstance(value, torch.Tensor) and field != "scheduler_metadata"
    }


class _Replays(CudaGraphManager):
    """What stands below vLLM's manager of the model's graphs: calls for graphs."""

    prepared: Metadata
    """By the current step, or for the current capture."""
    replayed: list[tuple[BatchExecutionDescriptor, Places]]
    """The graph of each step that was a replay, and what the step had prepared."""
    captured: dict[BatchExecutionDescriptor, Places]

    @torch.inference_mode()
    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            forward = create_forward_fn(desc, warmup=False)
            self.captured[desc] = places(self.prepared)
            forward(CUDAGraphMode.NONE)
            self.graphs[desc] = self._call_again(desc, forward, self.prepared)
        self._graphs_captured = True

    def _call_again(
        self,
        desc: BatchExecutionDescriptor,
        forward: Callable[[CUDAGraphMode], None],
        captured: Metadata,
    ) -> Any:
        def replay() -> None:
            self.replayed.append((desc, places(self.prepared)))
            for layer, fields in captured.items():
                fields.scheduler_metadata = self.prepared[layer].scheduler_metadata
            forward(CUDAGraphMode.NONE)

        return SimpleNamespace(replay=replay)


class CpuGraphs(ModelCudaGraphManager, _Replays):
    """vLLM's manager, with `_Replays` below it.

    After each replay the network is called as it is without a graph, on the same rows:
    its hidden states must be the same.
    """

    call_eagerly: Callable[[int], torch.Tensor]

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        hidden_states = super().run_fullgraph(desc)
        count = int(next(iter(self.prepared.values())).query_start_loc[-1])
        found = hidden_states[:count].clone()
        assert torch.equal(found, self.call_eagerly(desc.num_tokens)[:count])
        return hidden_states

    @property
    def sizes(self) -> list[int]:
        """Requests that each replay had room for."""
        return [desc.num_reqs for desc, _ in self.replayed]


@contextmanager
def whole_graphs(engine: Engine, width: int, sizes: list[int]) -> Iterator[CpuGraphs]:
    """Have an engine take graphs for steps in which requests have `width` rows each.

    Args:
        sizes: numbers of requests to capture for, rising.
    """
    runner = engine.runner
    compilation = runner.vllm_config.compilation_config
    with pytest.MonkeyPatch.context() as patch:
        rows = [width * size for size in sizes]
        patch.setattr(compilation, "cudagraph_capture_sizes", rows)
        patch.setattr(compilation, "max_cudagraph_capture_size", rows[-1])
        patch.setattr(type(current_platform), "_global_graph_pool", object())
        with set_current_vllm_config(runner.vllm_config):
            graphs = CpuGraphs(
                runner.vllm_config,
                runner.device,
                CUDAGraphMode.FULL_DECODE_ONLY,
                decode_query_len=width,
            )
            graphs.replayed, graphs.captured = [], {}
            prepare_attn = runner.model_state.prepare_attn

            last: list[Any] = []

            def note(batch: InputBatch, mode: Any, *rest: Any, **more: Any) -> Metadata:
                last[:] = batch, *rest
                graphs.prepared = prepare_attn(batch, mode, *rest, **more)
                return graphs.prepared

            def call_eagerly(num_tokens: int) -> torch.Tensor:
                batch, *rest = last
                metadata = prepare_attn(batch, CUDAGraphMode.NONE, *rest)
                slots = build_slot_mappings_by_layer(
                    runner.block_tables.slot_mappings[:, :num_tokens],
                    runner.kv_cache_config,
                )
                buffers = runner.input_buffers
                with set_forward_context(
                    metadata,
                    runner.vllm_config,
                    num_tokens=num_tokens,
                    slot_mapping=slots,
                ):
                    return runner.model(
                        input_ids=buffers.input_ids[:num_tokens],
                        positions=buffers.positions[:num_tokens],
                        inputs_embeds=None,
                        intermediate_tensors=None,
                    )

            graphs.call_eagerly = call_eagerly
            patch.setattr(runner.model_state, "prepare_attn", note)
            graphs.capture(
                runner.model,
                runner.model_state,
                runner.input_buffers,
                None,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
            )
        patch.setattr(runner, "cudagraph_manager", graphs)
        yield graphs
