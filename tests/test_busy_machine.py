# SPDX-License-Identifier: Apache-2.0
"""The built-in models start where other processes hold nearly all memory.

The engines run in a process of their own, in which everything that measures memory
finds nine tenths of it taken.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.platforms import current_platform

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
import sys
from vllm import LLM, SamplingParams

# README.md's, offline.
ENGINES = {
    "llada-tiny": {},
    "llama-tiny": {"speculative_config": {"method": "deer", "model": "deer-tiny"}},
}
greedy = SamplingParams(temperature=0, max_tokens=8)
for model, options in ENGINES.items():
    llm = LLM(model, enforce_eager=True, max_num_seqs=4, **options)
    print("text", model, llm.generate(["Copy [Ada]"], greedy)[0].outputs[0].text)
    cache = llm.llm_engine.vllm_config.cache_config
    print("cache", model, cache.kv_cache_memory_bytes)
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
print("text pair", router.generate(["Copy [Ada]"], greedy)[0].outputs[0].text)
del router

# What the user says holds, be it too much.
try:
    LLM("llama-tiny", enforce_eager=True, gpu_memory_utilization=0.5)
except Exception as error:
    print("refused", "less than desired CPU memory" in str(error))
"""


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
        assert "Ada" in line
    assert "refused True" in lines
