# SPDX-License-Identifier: Apache-2.0
"""Model runner V2 on a CPU build without Triton, and who runs on V1.

vLLM picks V2 only where Triton works. Our platform replaces the kernels that V2
launches (`kernels/runner_cpu/`) and can say so nowhere, so the gates are wrapped.
Diffusion models always run on V2, autoregressive ones where a user asks for it
(VLLM_USE_V2_MODEL_RUNNER=1).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_dlm.config.engine_keys import RUNNER
from vllm_dlm.model_executor import clean_pages
from vllm_dlm.patches.ledger import Where, apply, entries, patch
from vllm_dlm.vllm_objects import replace

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu_worker import Worker

_GATE = "docs/upstream.md#a-platform-cannot-say-that-it-replaces-kernels"


@patch(
    "vllm.config.vllm:VllmConfig.use_v2_model_runner",
    why=(
        "Diffusion models run only on model runner V2, which vLLM does not pick where "
        "Triton is missing, as on the CPU wheel. All our speculative methods but one "
        "run only on V1, which vLLM picks nowhere else."
    ),
    upstream=_GATE,
    drop_when="vLLM asks the platform instead of HAS_TRITON, and V2 takes drafters",
)
def use_v2_model_runner(
    original: Callable[[VllmConfig], bool],
) -> Callable[[VllmConfig], bool]:
    """True for diffusion models on a CPU whose kernels we replace; what a speculative
    method was made ready for. Every other engine, and an explicit
    VLLM_USE_V2_MODEL_RUNNER, is untouched."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    def decide(self: VllmConfig) -> bool:
        own = self.additional_config
        if isinstance(own, dict) and RUNNER in own:
            return bool(own[RUNNER] == 2)
        is_free = envs.VLLM_USE_V2_MODEL_RUNNER is None
        if is_free and not HAS_TRITON and _is_diffusion(self):
            return True
        return original(self)

    return decide


@patch(
    "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
    why=(
        "Attention on a CPU reads a page to its end: NaNs that one request has left "
        "there are the next one's."
    ),
    upstream="docs/upstream.md#nans-of-one-request-reach-the-next-on-a-cpu",
    drop_when="the CPU's attention kernel does not read behind the keys",
    where=Where.CPU,
)
def needs_kv_cache_zeroing(
    original: Callable[[KVCacheConfig], bool],
) -> Callable[[KVCacheConfig], bool]:
    """True in processes that serve one of our models on a CPU."""

    def needs(self: KVCacheConfig) -> bool:
        return clean_pages.are_needed() or original(self)

    return needs


@patch(
    "vllm.config.vllm:VllmConfig._validate_v2_model_runner",
    why="The gate of the model runner again, where a finished config is validated.",
    upstream=_GATE,
    drop_when="vLLM asks the platform instead of HAS_TRITON",
    where=Where.CPU_KERNELS,
)
def validate_v2_model_runner(
    original: Callable[[VllmConfig], None],
) -> Callable[[VllmConfig], None]:
    """Keeps the check for unsupported features, and skips the one for Triton: it adds
    the features whose kernels are not replaced."""

    def check(self: VllmConfig) -> None:
        if _is_diffusion(self):
            whose, why = "diffusion models need", ""
            unsupported = self._get_v2_model_runner_unsupported_features()
        else:
            from vllm_dlm.model_executor.cpu_runner_limits import unreplaced_features

            whose = "VLLM_USE_V2_MODEL_RUNNER=1 asks for"
            why = " on a CPU without Triton: unset it to use V1"
            unsupported = self._get_v2_model_runner_unsupported_features()
            unsupported += unreplaced_features(self)
        if unsupported:
            raise ValueError(
                f"Model Runner V2, which {whose}, does not yet "
                f"support: {', '.join(unsupported)}{why}"
            )

    return check


@patch(
    "vllm.triton_utils.dispatcher:_rebind_kernels",
    why=(
        "Overriding a kernel scans every loaded module and dies on llvmlite's library "
        "handle, which answers any attribute, so on any CPU worker that starts after "
        "numba was imported."
    ),
    upstream="docs/upstream.md#overriding-a-kernel-dies-on-llvmlite",
    drop_when="the scan checks that `__dict__` is a dict",
    where=Where.CPU_KERNELS,
    mends_vllm=True,
)
def rebind_kernels(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """The scan sees vLLM's modules, and ours, alone: no others hold vLLM's kernels.

    Thousands are loaded, and so it takes a sixth of the time, a fifth of a second less.
    """
    from vllm.triton_utils import dispatcher

    def rebind(overrides: Any) -> None:
        seen = {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in ("vllm", "vllm_dlm")
        }
        replace(dispatcher, "sys", types.SimpleNamespace(modules=seen))
        try:
            original(overrides)
        finally:
            replace(dispatcher, "sys", sys)

    return rebind


@patch(
    "vllm.triton_utils:triton.next_power_of_2",
    why=(
        "Runner V2 sizes its launches with triton.next_power_of_2 on the host; vLLM's "
        "stand-in for a missing Triton lacks it."
    ),
    upstream="docs/upstream.md#tritonplaceholder-lacks-next_power_of_2",
    drop_when="TritonPlaceholder has next_power_of_2",
    where=Where.CPU_KERNELS,
    adds=True,
)
def next_power_of_2(_: None) -> Callable[[int], int]:
    """Adds vLLM's own next_power_of_2 to the stand-in."""
    from vllm.utils.math_utils import next_power_of_2 as of_vllm

    return of_vllm


@patch(
    "vllm.v1.worker.gpu_worker:Worker.__init__",
    why="The gate of the model runner once more, in a worker, since vLLM 0.33.",
    upstream=_GATE,
    drop_when="vLLM asks the platform instead of HAS_TRITON",
    where=Where.CPU_WORKER,
)
def worker_init(original: Callable[..., None]) -> Callable[..., None]:
    """For engines on V2 the module takes Triton to be there while the worker is made;
    it looks at nothing but this check."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker import gpu_worker

    def make(self: Worker, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        replace(gpu_worker, "HAS_TRITON", vllm_config.use_v2_model_runner)
        try:
            original(self, vllm_config, *args, **kwargs)
        finally:
            replace(gpu_worker, "HAS_TRITON", HAS_TRITON)

    return make


def apply_cpu_patches() -> None:
    """Let engines use model runner V2 on a CPU build without Triton.

    Call it once `vllm.config` is fully imported. Where Triton works there is little
    to do.
    """
    from vllm.triton_utils import HAS_TRITON

    apply(entries(__name__, Where.EVERYWHERE, Where.CPU))
    if not HAS_TRITON:
        apply(entries(__name__, Where.CPU_KERNELS))


def apply_worker_patches() -> None:
    """Let workers on model runner V2 be made on a CPU build without Triton.

    Call it in a worker, before its class is resolved. vLLM 0.32 has no such check.
    """
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker import gpu_worker

    if not HAS_TRITON and hasattr(gpu_worker, "HAS_TRITON"):
        apply(entries(__name__, Where.CPU_WORKER))


def _is_diffusion(vllm_config: VllmConfig) -> bool:
    model_config = vllm_config.model_config
    return model_config is not None and model_config.is_diffusion
