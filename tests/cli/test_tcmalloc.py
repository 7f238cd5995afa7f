# SPDX-License-Identifier: Apache-2.0
"""tcmalloc: what is found and said of it, and that vLLM preloads what `make env` links.

Where the machine has no tcmalloc, an empty library of its name stands in: all that
matters here is which library a process has loaded, and from where.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.platforms import current_platform

from vllm_dlm.cli import tcmalloc

if not current_platform.is_cpu():
    pytest.skip("of a CPU", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
FINDING = "from vllm_dlm.cli import tcmalloc; print(tcmalloc.finding())"


def run(*command: str, path: Path | None = None, **variables: str) -> str:
    """What a Python command prints, in a process with this malloc and no other."""
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment |= {"LD_LIBRARY_PATH": ""} | variables
    if path is not None:
        paths = (str(path), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder of its own: the machine's, or an empty one."""
    path = tmp_path_factory.mktemp("lib") / tcmalloc.NAMES[0]
    if there := tcmalloc.installed():
        path.symlink_to(there)
    elif compiler := shutil.which("gcc"):
        command = [compiler, "-shared", "-x", "c", "-o", str(path), os.devnull]
        subprocess.run(command, check=True)
    else:
        pytest.skip("neither a tcmalloc nor gcc is on this machine")
    return path


@pytest.fixture
def other_vllm(tmp_path: Path) -> Path:
    """A folder with a vLLM of links to the installed one's files."""
    shutil.copytree(
        Path(vllm.__file__).parent,
        tmp_path / "site" / "vllm",
        copy_function=lambda file, link: os.symlink(os.path.realpath(file), link),
        ignore=shutil.ignore_patterns("__pycache__", "libtcmalloc*"),
    )
    return tmp_path / "site"


def test_preloaded(library: Path):
    said = run("-c", FINDING, LD_PRELOAD=str(library))
    assert said == f"preloaded: {library.resolve()}\n"


def test_what_to_type_without_it(library: Path, other_vllm: Path):
    here = {"path": other_vllm, "LD_LIBRARY_PATH": str(library.parent)}
    said = run("-c", FINDING, **here)
    assert said.startswith("not preloaded; 5 to 10 % more tokens/s")
    assert said.endswith(f": start with LD_PRELOAD={library} vllm serve ...\n")


@pytest.mark.skipif(tcmalloc.installed() is not None, reason="tcmalloc is installed")
def test_what_to_install(other_vllm: Path):
    said = run("-c", FINDING, path=other_vllm)
    assert said.startswith("not on this machine; ")
    assert "Install libtcmalloc-minimal4 (Debian" in said


def test_a_link_for_vllm(library: Path, other_vllm: Path):
    """What `make env` runs: once it says so, and it clears away what leads nowhere."""
    here = {"path": other_vllm, "LD_LIBRARY_PATH": str(library.parent)}
    link = other_vllm / "vllm" / "libs" / library.name
    said = run("-m", "vllm_dlm.cli.tcmalloc", **here)
    assert said.strip().endswith(f"will be started with {library}")
    assert run("-m", "vllm_dlm.cli.tcmalloc", **here) == ""
    assert link.resolve() == library.resolve()
    said = run("-c", FINDING, path=other_vllm)
    assert said.startswith(f"vLLM preloads {link} into the processes that it starts")
    assert f"LD_PRELOAD={library.resolve()} before its command" in said

    link.unlink()
    link.symlink_to(other_vllm / "gone")
    run("-m", "vllm_dlm.cli.tcmalloc", **here)
    assert link.resolve() == library.resolve()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(("device", "is_run"), [("cpu", True), ("cuda", False)])
def test_make_env_runs_it_on_a_cpu(device: str, is_run: bool):
    command = ["make", "--dry-run", "env", f"DEVICE={device}", "VENV=no-such-folder"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("-m vllm_dlm.cli.tcmalloc" in done.stdout) == is_run


@pytest.mark.slow
def test_an_engine_runs_with_what_is_linked(library: Path, other_vllm: Path):
    """In a process of its own, as servers and `vllm.LLM` have it."""
    (other_vllm / "vllm" / "libs").mkdir()
    (other_vllm / "vllm" / "libs" / library.name).symlink_to(library)
    script = """
from pathlib import Path
import psutil
from vllm_dlm import LLM

if __name__ == "__main__":
    llm = LLM("llada-tiny", enforce_eager=True, max_num_seqs=2)
    for process in psutil.Process().children(recursive=True):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        if "libtcmalloc" in maps and "libtorch" in maps:
            print("the engine has it")
    llm.generate("Reverse [Ada, Ben]", use_tqdm=False)
"""
    file = other_vllm.parent / "script.py"
    file.write_text(script)
    said = run(str(file), path=other_vllm, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert "the engine has it" in said
