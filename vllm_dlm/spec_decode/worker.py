# SPDX-License-Identifier: Apache-2.0
"""The worker class of engines with one of our speculative methods.

vLLM builds the drafter that it takes the method for; this worker puts ours in its
place, before any weights are loaded. The class is made for the platform's own worker.
"""

from __future__ import annotations

from typing import Any

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
    """Replace a model runner's drafter by the one that the options ask for.

    Raises:
        RuntimeError: this vLLM's runner is not one that we know.
    """
    if not hasattr(runner, "drafter"):
        if runner.speculative_config is None:
            raise RuntimeError("the model runner has no speculative config")
        return  # of a pipeline, only the last rank drafts
    config = runner.vllm_config
    proposer = load(METHODS[config.additional_config[CONFIG_KEY]["method"]].proposer)
    if config.speculative_config.method == "draft_model":
        runner.drafter = proposer(config, runner.device, runner)
        # From here on: vLLM's own constructor refuses it for draft models. Drafting
        # then comes after the step's tokens are known, and without the rejected ones.
        config.speculative_config.disable_padded_drafter_batch = True
    else:
        runner.drafter.runner = runner
    # vLLM stops drafting for all requests when the longest is near its end; ours
    # ask what each request may take.
    most = runner.num_spec_tokens
    runner.effective_drafter_max_model_len = runner.max_model_len + most
