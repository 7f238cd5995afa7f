# SPDX-License-Identifier: Apache-2.0
"""The built-in models start where other processes hold nearly all memory.

The engines run in a process of their own, in which everything that measures memory
finds nine tenths of it taken.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_dlm.config import aliases
from vllm_dlm.config.engine_keys import SWITCHING
from vllm_dlm.model_executor import cpu_memory

if not current_platform.is_cpu():
    pytest.skip("how memory is measured on a CPU", allow_module_level=True)

# Python imports it by itself, before anything else, from where PYTHONPATH says.
NINE_TENTHS_ARE_HELD = """
import os, psutil

measure, exists = psutil.virtual_memory, os.path.exists

def virtual_memory():
    found = measure()
    return found._replace(available=min(found.available, found.total // 10))

psutil.virtual_memory = virtual_memory
# Where a memory node has no file of its own, vLLM asks psutil.
os.path.exists = lambda path: "/node/node" not in str(path) and exists(path)
"""

ENGINES = """
from vllm import LLM, SamplingParams

# README.md's, offline.
ENGINES = {
    "llada-tiny": {},
    "llama-tiny": {"speculative_config": {"method": "deer", "model": "deer-tiny"}},
}
greedy = SamplingParams(temperature=0, max_tokens=16)
question = [{"role": "user", "content": "Reverse [Ada, Ben, Carl]"}]
for model, options in ENGINES.items():
    llm = LLM(model, enforce_eager=True, max_num_seqs=4, **options)
    print("text", model, llm.chat(question, greedy)[0].outputs[0].text)
    del llm

from vllm_dlm import EntropyRouter

options = {"enforce_eager": True, "max_num_seqs": 4}
router = EntropyRouter(
    "llama-tiny-draft",
    "llama-tiny",
    tau=0.5,
    small_options=options,
    large_options=options,
)
print("text pair", router.chat(question, greedy)[0].outputs[0].text)
del router

# What the user says holds, be it too much.
try:
    LLM("llama-tiny", enforce_eager=True, gpu_memory_utilization=0.5)
except Exception as error:
    print("refused", "less than desired CPU memory" in str(error))
"""


def cache_bytes(model: str, **options: Any) -> int | None:
    """What an engine would take for keys and values; None leaves it to vLLM."""
    args = EngineArgs(model=model, max_num_seqs=4, **options)
    return args.create_engine_config().cache_config.kv_cache_memory_bytes


DEER = {"method": "deer", "model": "deer-tiny"}


def test_what_the_cache_takes(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    # Keys and values, 8 layers of 128 numbers in bfloat16; 4 requests of 8 pages of
    # 128 tokens, and a page of vLLM's own.
    plain = 2 * 8 * 128 * 2 * (4 * 8 + 1) * 128
    assert cache_bytes("llama-tiny", dtype="bfloat16") == plain
    drafted = cache_bytes("llama-tiny", dtype="bfloat16", speculative_config=DEER)
    assert drafted is not None and drafted > plain  # the drafter has keys as well
    # It is the user's where the user says, and vLLM's for other models.
    assert cache_bytes("llama-tiny", gpu_memory_utilization=0.5) is None
    assert cache_bytes("llama-tiny", kv_cache_memory_bytes=12345) == 12345
    own = tmp_path / "own"
    shutil.copytree(aliases.resolve("llama-tiny"), own)
    assert cache_bytes(str(own)) is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert cache_bytes("llama-tiny") == 1 << 30


def test_the_cache_leaves_half_of_what_is_free(monkeypatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(cpu_memory, "_free_bytes", lambda: 1 << 20)
    assert cache_bytes("llama-tiny") == 1 << 19
    assert cache_bytes("llada-tiny") == 1 << 19
    # Two engines share one machine.
    pair = {"additional_config": {SWITCHING: "small"}}
    assert cache_bytes("llama-tiny", **pair) == 1 << 18


@pytest.mark.slow
def test_built_in_models_start_on_a_busy_machine(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NINE_TENTHS_ARE_HELD)
    environment = dict(os.environ)
    # Other tests say how much each engine takes.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", ENGINES],
        env={
            **environment,
            "PYTHONPATH": os.pathsep.join(paths),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    found = {line.split()[1]: line for line in lines if line.startswith("text ")}
    assert set(found) == {"llada-tiny", "llama-tiny", "pair"}
    for line in found.values():
        assert "Carl" in line
    assert "refused True" in lines
