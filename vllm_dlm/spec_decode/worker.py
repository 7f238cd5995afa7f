# SPDX-License-Identifier: Apache-2.0
"""The worker class of engines with one of our speculative methods.

vLLM builds the drafter of the method that it knows (`front_end.py`). This worker puts
our drafter in its place, before any weights are loaded. Its base class is the
platform's own worker.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.mem_utils import format_gib

from vllm_dlm.config.engine_keys import SPECULATION
from vllm_dlm.registry import load
from vllm_dlm.spec_decode.options import METHODS
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

logger = init_logger(__name__)


def _platform_worker() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


_PlatformWorker: Any = _platform_worker()


class SpeculativeWorker(_PlatformWorker):
    """The platform's worker, with our drafter."""

    def init_device(self) -> None:
        """Build the model runner, then replace its drafter."""
        super().init_device()
        if self.use_v2_model_runner:
            install_speculator(self.model_runner)
        else:
            install(self.model_runner)

    def determine_available_memory(self) -> int:
        """Bytes that keys and values may take: vLLM's measure, less our distributions.

        vLLM does not count the distributions from which drafts were drawn. A size that
        the user has set is left as it is.

        Raises:
            ValueError: nothing would be left.
        """
        available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        reserved, often = probability_bytes(self.vllm_config), "twice"
        if self.use_v2_model_runner:
            # What is kept stands in a buffer there, which vLLM has measured.
            reserved, often = reserved // 2, "once"
        about = (
            f"{format_gib(reserved)} GiB for the distributions of a step's drafts "
            "(max_num_seqs times num_speculative_tokens, at most "
            f"max_num_batched_tokens, times the vocabulary, 4 bytes each, {often})"
        )
        if reserved >= available:
            raise ValueError(
                f"no memory is left for keys and values: {format_gib(available)} GiB "
                f"are free, less {about}. Lower one of the three, or set "
                "kv_cache_memory_bytes, if all requests are greedy"
            )
        if reserved:
            logger.info("Reserved %s.", about)
        return available - reserved


def probability_bytes(config: VllmConfig) -> int:
    """Most bytes that attached distributions take.

    The distributions of a whole batch are kept for the next step, which copies those
    that it verifies. There are never more than tokens in a step (`drafter.limits`).
    """
    speculative = config.speculative_config
    if speculative.draft_sample_method != "probabilistic":
        return 0
    scheduler = config.scheduler_config
    rows = min(
        scheduler.max_num_seqs * speculative.num_speculative_tokens,
        scheduler.max_num_batched_tokens,
    )
    vocabulary: int = config.model_config.get_vocab_size()
    return 2 * rows * vocabulary * torch.float32.itemsize


def install(runner: GPUModelRunner) -> None:
    """Replace the drafter of a model runner V1 by the one that the options ask for."""
    config = runner.vllm_config
    proposer = load(METHODS[config.additional_config[SPECULATION]["method"]].proposer)
    if config.speculative_config.method == "draft_model":
        replace(runner, "drafter", proposer(config, runner.device, runner))
        # Only from here on: vLLM's own constructor refuses this for draft models. With
        # it, drafting begins when the step's tokens are known, without rejected ones.
        replace(config.speculative_config, "disable_padded_drafter_batch", True)
        replace(runner, "_get_spec_decode_draft_probs", partial(draft_probs, runner))
    else:
        runner.drafter.runner = runner
    # vLLM stops drafting for all requests when the longest is near its end; our
    # drafters look at each request alone.
    longest = runner.max_model_len + runner.num_spec_tokens
    replace(runner, "effective_drafter_max_model_len", longest)


def install_speculator(runner: Any) -> None:
    """The same for model runner V2, whose drafters are speculators."""
    config = runner.vllm_config
    method = METHODS[config.additional_config[SPECULATION]["method"]]
    assert method.speculator is not None, "the front end has chosen the runner"
    replace(runner, "speculator", None)  # its buffers may be large
    speculator = load(method.speculator)(config, runner.device, runner)
    replace(runner, "speculator", speculator)
    replace(runner, "draft_tokens_handler", speculator.handler)


def draft_probs(
    runner: GPUModelRunner, metadata: SpecDecodeMetadata
) -> torch.Tensor | None:
    """The distributions from which the drafts that are verified now were drawn.

    It replaces vLLM's method of the runner. There, if the distributions of one request
    are missing (it drafted before the last step), the drafts of all requests are
    verified as point masses, and a seeded text would depend on its neighbours. Here
    only the draft without a distribution is rejected, which is lossless as well.

    Returns:
        [drafted tokens, V] float32, or None where all are point masses.
    """
    known, requests = runner._draft_probs, runner._draft_prob_req_ids
    if known is None or requests is None:
        return None
    rows = {request: row for row, request in enumerate(requests)}
    parts = []
    for request, count in zip(
        runner.input_batch.req_ids, metadata.num_draft_tokens, strict=True
    ):
        row = rows.get(request)
        unknown = row is None or count > known.shape[1]
        parts.append(
            known.new_zeros(count, known.shape[2]) if unknown else known[row, :count]
        )
    return torch.cat(parts) if any(map(len, parts)) else None
