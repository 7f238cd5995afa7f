# SPDX-License-Identifier: Apache-2.0
"""Diffusion language models on stock vLLM.

Importing this package is cheap on purpose: vLLM loads its platform plugins while
`vllm.config` is half imported, and anything of vLLM imported here would be circular.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_dlm import search
    from vllm_dlm.entrypoints.canvas_fields import canvas_fields
    from vllm_dlm.entrypoints.llm import LLM
    from vllm_dlm.entrypoints.step_maps import StepMap, step_map
    from vllm_dlm.evaluation.likelihood import LogLikelihood, loglikelihood
    from vllm_dlm.switching.router import EntropyRouter

try:
    __version__ = version("vllm-dlm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0+unknown"

__all__ = [
    "LLM",
    "EntropyRouter",
    "LogLikelihood",
    "StepMap",
    "__version__",
    "canvas_fields",
    "loglikelihood",
    "search",
    "step_map",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vllm_dlm.entrypoints.llm import LLM

        return LLM
    if name == "EntropyRouter":
        from vllm_dlm.switching.router import EntropyRouter

        return EntropyRouter
    if name == "canvas_fields":
        # Not `from`: the module has the same name.
        from vllm_dlm.entrypoints import canvas_fields

        return canvas_fields.canvas_fields
    if name == "search":
        from importlib import import_module

        return import_module("vllm_dlm.search")
    if name in ("LogLikelihood", "loglikelihood"):
        from vllm_dlm.evaluation import likelihood

        return getattr(likelihood, name)
    if name in ("StepMap", "step_map"):
        from vllm_dlm.entrypoints import step_maps

        return getattr(step_maps, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
