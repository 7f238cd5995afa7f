# SPDX-License-Identifier: Apache-2.0
"""The worker class of engines with one of our speculative methods.

vLLM builds the drafter that it takes the method for; this worker puts ours in its
place, before any weights are loaded. The class is made for the platform's own worker.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm_dlm.plugin import load
from vllm_dlm.spec_decode.options import CONFIG_KEY, METHODS


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
        install(self.model_runner)


def install(runner: Any) -> None:
    """Replace a model runner's drafter by the one that the options ask for."""
    config = runner.vllm_config
    proposer = load(METHODS[config.additional_config[CONFIG_KEY]["method"]].proposer)
    if config.speculative_config.method == "draft_model":
        runner.drafter = proposer(config, runner.device, runner)
        # From here on: vLLM's own constructor refuses it for draft models. Drafting
        # then comes after the step's tokens are known, and without the rejected ones.
        config.speculative_config.disable_padded_drafter_batch = True
        runner._get_spec_decode_draft_probs = partial(draft_probs, runner)
    else:
        runner.drafter.runner = runner
    # vLLM stops drafting for all requests when the longest is near its end; ours
    # ask what each request may take.
    most = runner.num_spec_tokens
    runner.effective_drafter_max_model_len = runner.max_model_len + most


def draft_probs(runner: Any, metadata: Any) -> torch.Tensor | None:
    """What the drafts that are verified now were drawn from.

    As vLLM's method of the runner, which has all requests verified as point masses
    where one's are missing (it drafted before the last step): a seeded text would
    depend on its neighbours. Without a distribution a draft is rejected, which is
    lossless as well.

    Args:
        metadata: vLLM's `SpecDecodeMetadata`.

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
