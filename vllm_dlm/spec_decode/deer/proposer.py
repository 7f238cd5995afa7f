# SPDX-License-Identifier: Apache-2.0
"""DEER on vLLM's model runner V1, in place of vLLM's draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_dlm.spec_decode.deer.rounds import DeerRounds
from vllm_dlm.spec_decode.drafter import Drafter

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class DeerProposer(DeerRounds, Drafter):
    """What vLLM's runner asks of a drafter, answered by the network."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: GPUModelRunner
    ) -> None:
        Drafter.__init__(self, vllm_config, device, runner)
        self.supports_mm_inputs = False
        self.set_up(vllm_config)

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Load the drafter; called by vLLM once the target is loaded."""
        self.load_network()
        self._draft_attn_layer_names = self.paged_layers

    def initialize_attn_backend(
        self,
        kv_cache_config: KVCacheConfig,
        kernel_block_sizes: list[int] | None = None,
    ) -> None:
        """Prepare attention over the drafter's pages; called when vLLM has sized them.

        Raises:
            ValueError: pages of a size that the drafter's blocks do not fit into.
        """
        group = self.use_pages(kv_cache_config, kernel_block_sizes)
        self.draft_attn_groups, self.kv_cache_gid = [group], self.page_group

    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: Any = None,
    ) -> None:
        """A forward without attention, for vLLM's memory profile and compilation."""
        if not is_graph_capturing:  # rows of a round differ too much for graphs
            self.profile(num_tokens)

    def reserved(self) -> np.ndarray:
        """[R]: positions for which the requests of the step have pages."""
        table = self.runner.input_batch.block_table[self.kv_cache_gid]
        rows = len(self.runner.input_batch.req_ids)
        reserved: np.ndarray = table.num_blocks_per_row[:rows] * table.block_size
        return reserved

    def page_table(self, requests: np.ndarray, width: int) -> np.ndarray:
        """[R, width] int32: the first pages of these rows of the batch."""
        table = self.runner.input_batch.block_table[self.kv_cache_gid]
        pages: np.ndarray = table.get_numpy_array()[requests, :width]
        return pages
