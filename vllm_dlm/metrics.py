# SPDX-License-Identifier: Apache-2.0
"""Counters of the work that a server does, beside vLLM's own on `/metrics`.

vLLM's `vllm:diffusion_*` counters have denoise steps, canvas positions and final
tokens. Two of these have what steps cost: rows through the network, and rows through
lm_head, of which only positions that a strategy reads have one. Entry point of
`vllm.stat_logger_plugins`; models that are not ours count nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import prometheus_client
from vllm.v1.metrics.loggers import StatLoggerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# No "vllm" in the names: vLLM unregisters collectors that have it when it starts.
COUNTERS = {
    "dlm:rows": "Rows (positions) that went through the network.",
    "dlm:lm_head_rows": "Rows that went through lm_head.",
    "dlm:broken_requests": "Requests that ended in an error: no usable logits.",
    "dlm:unmatched_requests": "Requests that ended in an error: no match of a pattern.",
}
"""Name on `/metrics`, without its `_total`, and help; in the order of `work_done`."""


@functools.cache
def _counters() -> list[prometheus_client.Counter]:
    """One set a process: engines that are started in it share it, by label."""
    labels = ["model_name", "engine"]
    return [prometheus_client.Counter(*item, labels) for item in COUNTERS.items()]


def work_done(stats: Any) -> list[int]:
    """A scheduler's step in the order of `COUNTERS`, [] for other models' stats.

    They travel in a field that vLLM keeps for drafts of autoregressive models.

    Args:
        stats: vLLM's `SchedulerStats`, or None.
    """
    decoding = getattr(stats, "spec_decoding_stats", None)
    return [] if decoding is None else decoding.num_draft_tokens_per_pos


class DlmStatLogger(StatLoggerBase):
    """Counts for Prometheus; see the module docstring."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        hf_config = vllm_config.model_config.hf_config
        self._counters: list[Any] = []
        if hasattr(hf_config, "dlm_server"):
            name = vllm_config.model_config.served_model_name
            labels = (name, str(engine_index))
            self._counters = [counter.labels(*labels) for counter in _counters()]

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        work = work_done(scheduler_stats) if self._counters else []
        for counter, amount in zip(self._counters, work, strict=False):
            counter.inc(amount)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
