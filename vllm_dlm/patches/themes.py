# SPDX-License-Identifier: Apache-2.0
"""The files that hold entries of the ledger, and who applies them.

Importing a theme imports nothing of vLLM, so that all entries can be listed without it.
"""

from __future__ import annotations

from importlib import import_module

from vllm_dlm.patches.ledger import PATCHES, Patch, Where, apply, entries

THEMES = (
    # Which model runner, and its kernels: on a CPU by the platform, in every process.
    "vllm_dlm.patches.cpu_runner",
    # Drafts verified rightly on a CPU: by the platform, in workers.
    "vllm_dlm.patches.cpu_verification",
    # Experts by their numbers on a rank, on a CPU: by the platform, in workers.
    "vllm_dlm.patches.cpu_experts",
    # By the plugin, in every process; what only a server needs, there alone.
    "vllm_dlm.patches.flags",
    "vllm_dlm.patches.adapters",
    "vllm_dlm.patches.admission",
    "vllm_dlm.patches.handlers",
    "vllm_dlm.patches.frames",
    "vllm_dlm.patches.ray_failures",
    "vllm_dlm.patches.endings",
    # By the plugin; what changes a model of vLLM's own, where that is loaded.
    "vllm_dlm.patches.diffusion_gemma",
)


def every_patch() -> dict[str, Patch]:
    """All entries by symbol, whether or not they are in force here."""
    for theme in THEMES:
        import_module(theme)
    return PATCHES


def apply_front_end_patches(ours: bool) -> None:
    """What requests meet in the process that admits them to an engine.

    That process imports these modules in any case, but later than it loads plugins, and
    no other process needs them.

    Args:
        ours: whether its model is one of ours; of others, requests are only checked.
    """
    every_patch()
    for theme in THEMES:
        apply(entries(theme, Where.ADMISSION, *([Where.FRONT_END] if ours else [])))


def apply_plugin_patches() -> None:
    """Flags, model aliases, the admission of requests, answers.

    What only the HTTP server needs is applied where its modules are loaded already,
    as they are when `vllm serve` loads plugins: importing them costs seconds.
    """
    every_patch()
    for theme in THEMES:
        apply(entries(theme, Where.EVERYWHERE, Where.SERVER))
