# SPDX-License-Identifier: Apache-2.0
"""The examples run as they are, and stay short."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import fast

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
CUSTOM = ROOT / "examples/custom_strategy"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short(path: Path):
    """Under 40 lines of code, beside what it says of itself; the loop, under 80."""
    source = path.read_text(encoding="utf-8")
    if path.name == "plain_loop.py":
        assert source.count("\n") < 80
        return
    first, *_ = ast.parse(source).body
    lines = source.splitlines()[first.end_lineno :]
    assert len([line for line in lines if line.strip()]) < 40


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints, run as a user does: with vLLM's own processes."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "VLLM_ENABLE_V1_MULTIPROCESSING"
    }
    done = subprocess.run(
        list(map(str, command)),
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


LOOP = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("vllm" in sys.modules, "transformers" in sys.modules)
"""


@pytest.mark.parametrize(
    ("strategy", "num_steps"),
    fast(("threshold", 6), of=(("threshold", 6), ("static", 16))),
)
def test_plain_loop(strategy: str, num_steps: int):
    """The loop that docs point newcomers to: the engine's text, without vLLM."""
    example = ROOT / "examples/plain_loop.py"
    *steps, answer, loaded = run(
        sys.executable, "-c", LOOP, example, strategy
    ).splitlines()
    shuffled = "Shuffle [Ada, Ben, Carl, Dora, Emil]"
    assert answer == f"{shuffled} -> [Ben, Emil, Dora, Carl, Ada]"
    assert loaded == "False False"
    # Every step writes something; what it has written stays.
    masks = [step.count("·") for step in steps]
    assert masks == sorted(set(masks), reverse=True)
    assert len(steps) == num_steps
    assert (
        steps[-1]
        == f"step {steps[-1][5]}:  [Ben, Emil, Dora, Carl, Ada]∎∎∎∎∎{'·' * 16}"
    )


@pytest.mark.slow
def test_plain_loop_says_what_it_cannot_decode():
    example = ROOT / "examples/plain_loop.py"
    done = subprocess.run(
        [sys.executable, example, "joint"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "joint reads more than this loop has" in done.stderr


@pytest.mark.slow
def test_offline():
    printed = run(sys.executable, ROOT / "examples/offline.py")
    assert "Reverse [Ada, Ben, Carl] -> [Carl, Ben, Ada]" in printed
    # Three strategies in one batch: each answered, and each said what it took.
    for prompt in ("Sort [Eva, Dan, Ada]", "Add 27+15"):
        assert f"{prompt} -> " in printed
    assert printed.count(" forwards)") == 3


@pytest.mark.slow
def test_speculative():
    printed = run(sys.executable, ROOT / "examples/speculative.py")
    assert "Sort [Noah, Finn, Jack, Ben] -> [Ben, Finn, Jack, Noah]" in printed
    drafted, plain = re.findall(r"^Add 57\+22 -> (.*)$", printed, flags=re.M)
    assert drafted == plain and drafted.endswith("79")
    [(drafts, accepted)] = re.findall(r"(\d+) drafts, (\d+) tokens", printed)
    assert int(accepted) > 2 * int(drafts) > 0


# -- Ray ------------------------------------------------------------------

RAY = {
    "RAY_AUTH_MODE": "disabled",
    # Engines share the cores of a small machine, instead of a NUMA node each.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.slow
def test_ray_multi_gpu():
    printed = run(sys.executable, ROOT / "examples/ray_multi_gpu.py", **RAY)
    assert "Reverse [Ada, Ben, Carl] -> [Carl, Ben, Ada]" in printed
    assert "3 answers of llada-tiny on 2 workers" in printed


@pytest.mark.slow
def test_ray_data():
    printed = run(sys.executable, ROOT / "examples/ray_data.py", **RAY)
    for strategy in ("entropy", "threshold"):
        answer = f"{strategy}: Sort [Eva, Dan, Ada] -> [Ada, Dan, Eva]"
        assert printed.count(answer) == 2
    assert "12 rows with 2 engines of llada-tiny" in printed


@pytest.mark.slow
def test_ray_serve():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    example = ROOT / "examples/ray_serve.py"
    printed = run(sys.executable, example, "llada-tiny", "2", str(port), **RAY)
    assert "threshold: 200 [Ada, Dan, Eva]" in printed
    assert "entropy: 200 [Ada, Dan, Eva]" in printed
    (refused,) = (line for line in printed.splitlines() if "none-such: " in line)
    assert "none-such: 400" in refused and "choose one of" in refused


# -- a strategy in a package of its own -----------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder that pip has installed examples/custom_strategy to."""
    folder = tmp_path_factory.mktemp("custom")
    # A copy: building leaves files in the source.
    source = shutil.copytree(CUSTOM, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    target = folder / "installed"
    run(sys.executable, "-m", "pip", "install", *options, "--target", target, source)
    return str(target)


def test_the_documentation_shows_the_custom_strategy():
    file = (CUSTOM / "lead_rule.py").read_text(encoding="utf-8")
    _, _, code = file.split('"""', 2)
    documented = (ROOT / "docs/strategies.md").read_text(encoding="utf-8")
    assert f"```python\n{code.strip()}\n```" in documented


def test_the_documentation_shows_its_test():
    file = (CUSTOM / "test_lead_rule.py").read_text(encoding="utf-8")
    _, _, code = file.split('"""', 2)
    documented = (ROOT / "docs/strategies.md").read_text(encoding="utf-8")
    assert f"```python\n{code.strip()}\n```" in documented


@pytest.mark.slow
def test_its_test_passes(installed: str):
    test = CUSTOM / "test_lead_rule.py"
    options = ["-s", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, test]
    printed = run(*command, PYTHONPATH=installed)
    assert "lead (least=0.7), blocks of 8" in printed
    assert "decides as eagerly, bit for bit" in printed


def test_an_installed_strategy_is_listed(installed: str):
    cli = Path(sys.executable).with_name("vllm-dlm")
    printed = run(cli, "strategies", "lead", PYTHONPATH=installed)
    assert "every token that leads by enough" in printed
    assert "Least lead over the runner-up." in printed


SERVE = """
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm_dlm import LLM

def request(options):
    return SamplingParams(temperature=0, max_tokens=32, extra_args={"dlm": options})

if __name__ == "__main__":
    llm = LLM("llada-tiny", max_num_seqs=4)
    lead = {"strategy": "lead", "strategy_config": {"least": 0.7}}
    slow = {"strategy": "lead", "strategy_config": {"least": 1.0}}
    options = [lead, slow, {"strategy": "threshold"}]
    questions = ["Reverse [Ada, Ben, Carl]"] * 3
    answers = llm.generate(questions, list(map(request, options)))
    for answer in answers:
        output = answer.outputs[0]
        print("forwards", sum(output.spec_decode_metrics.histogram), output.text)
    try:
        wrong = {"strategy": "lead", "strategy_config": {"least": 2}}
        llm.generate(["Add 27+15"], request(wrong))
    except VLLMValidationError as error:
        print("refused", error)
"""


@pytest.mark.slow
def test_a_request_decodes_with_an_installed_strategy(installed: str, tmp_path: Path):
    script = tmp_path / "serve.py"
    script.write_text(SERVE, encoding="utf-8")
    printed = run(sys.executable, script, PYTHONPATH=installed).splitlines()
    answers = [line.split(" ", 2) for line in printed if line.startswith("forwards")]
    assert [text for _, _, text in answers] == ["[Carl, Ben, Ada]"] * 3
    fast, slow, _ = (int(forwards) for _, forwards, _ in answers)
    assert fast < slow
    (refusal,) = (line for line in printed if line.startswith("refused"))
    assert "least" in refusal and "1" in refusal
