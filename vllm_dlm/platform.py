# SPDX-License-Identifier: Apache-2.0
"""The CPU platform: diffusion models on the CPU wheel of vLLM, Ray included.

vLLM imports this module while `vllm.config` is half loaded, in every process, so
nothing of vLLM is imported at the top: the platform class is made when it is asked
for.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform
    from vllm.utils.argparse_utils import FlexibleArgumentParser


def platform_plugin() -> str | None:
    """Entry point of `vllm.platform_plugins`.

    Returns:
        The path of `DlmCpuPlatform` where the installed vLLM is a CPU build, else
        None, which leaves the choice to vLLM. `VLLM_DLM_DISABLE=1` also gives None.
    """
    if os.environ.get("VLLM_DLM_DISABLE") == "1" or not _is_cpu_build():
        return None
    return f"{__name__}.DlmCpuPlatform"


def multiplies_bfloat16() -> bool:
    """Whether matrices in bfloat16 are multiplied by oneDNN here.

    On x86 without AVX-512 torch has only a plain loop, which takes about ten times as
    long as a product in float32.
    """
    import torch

    has = torch.cpu.get_capabilities()
    needed = ("avx512_bw", "avx512_vl", "avx512_dq")
    return has.get("architecture") != "x86_64" or all(has.get(each) for each in needed)


def _is_cpu_build() -> bool:
    from vllm.platforms import vllm_version_matches_substr

    return vllm_version_matches_substr("cpu")


def _cpu_platform_class() -> "type[CpuPlatform]":
    """The CPU platform vLLM itself would pick: plain, or AMD Zen."""
    from vllm.platforms import cpu_platform_plugin
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(
        cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform"
    )


def _make_platform_class() -> "type[CpuPlatform]":
    base: Any = _cpu_platform_class()

    class DlmCpuPlatform(base):
        """vLLM's CPU platform with model runner V2."""

        # vLLM's Ray executor refuses a platform without a device key. On a CPU
        # cluster start Ray with logical GPUs: `ray start --num-gpus=<ranks>`.
        ray_device_key: str = "GPU"

        @property
        def supported_dtypes(self) -> "list[torch.dtype]":
            """The first is what `--dtype auto` makes of a checkpoint in float32."""
            import torch

            dtypes = super().supported_dtypes
            if multiplies_bfloat16():
                return dtypes
            return sorted(dtypes, key=lambda dtype: dtype != torch.float32)

        @classmethod
        def pre_register_and_update(
            cls, parser: "FlexibleArgumentParser | None" = None
        ) -> None:
            """Runs in the front end before the engine's config is built."""
            super().pre_register_and_update(parser)
            _apply_patches()

        @classmethod
        def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
            """Runs while the config is validated, also without `EngineArgs`."""
            _apply_patches()
            is_async = vllm_config.scheduler_config.async_scheduling
            super().check_and_update_config(vllm_config)
            if is_async and _is_ours(vllm_config):
                # vLLM needs none on a CPU. Our config hook asks for it only if the user
                # has.
                vllm_config.scheduler_config.async_scheduling = True
            _fit_built_in_model(vllm_config)

        @classmethod
        def register_custom_kv_cache_specs(
            cls, vllm_config: "VllmConfig | None"
        ) -> None:
            """Runs in the engine core, which unpickles its config, before its
            scheduler asks which model runner serves it. Elsewhere there may be no
            config."""
            from vllm_dlm.patches.cpu_verification import require_verification

            _apply_patches()
            if (
                vllm_config is not None
                and vllm_config.speculative_config is not None
                and not vllm_config.use_v2_model_runner
            ):
                require_verification()
            super().register_custom_kv_cache_specs(vllm_config)

        @classmethod
        def get_punica_wrapper(cls) -> str:
            """What multiplies rows with adapters (LoRA)."""
            return "vllm_dlm.model_executor.lora.cpu_rows.LoraRows"

        @classmethod
        def register_triton_kernel_overrides(cls) -> None:
            """Runs in each worker before its class is resolved."""
            from vllm_dlm.kernels.runner_cpu import register
            from vllm_dlm.patches.cpu_experts import apply_expert_patches
            from vllm_dlm.patches.cpu_runner import apply_worker_patches
            from vllm_dlm.patches.cpu_verification import apply_verification_patches

            # First: they repair the registration, and what is registered.
            _apply_patches()
            apply_verification_patches()
            apply_expert_patches()
            apply_worker_patches()
            super().register_triton_kernel_overrides()
            register()

    # Pickles of the platform refer to it by name.
    DlmCpuPlatform.__qualname__ = "DlmCpuPlatform"
    return DlmCpuPlatform


def _is_ours(vllm_config: "VllmConfig") -> bool:
    """Whether the config hook has prepared this configuration."""
    model_config = vllm_config.model_config
    return model_config is not None and hasattr(model_config.hf_config, "dlm_server")


def _fit_built_in_model(vllm_config: "VllmConfig") -> None:
    """Let a built-in autoregressive model start where others hold memory.

    Diffusion models have been here already, by their config hook.
    """
    from vllm_dlm.config.aliases import is_built_in

    model_config = vllm_config.model_config
    if model_config is not None and is_built_in(model_config.model):
        from vllm_dlm.model_executor.cpu_memory import size_kv_cache

        size_kv_cache(vllm_config)


def _apply_patches() -> None:
    from vllm_dlm.patches.cpu_runner import apply_cpu_patches

    apply_cpu_patches()


def __getattr__(name: str) -> Any:
    if name == "DlmCpuPlatform":
        platform = globals()[name] = _make_platform_class()
        return platform
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
