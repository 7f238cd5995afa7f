# SPDX-License-Identifier: Apache-2.0
"""Settings and marks for all tests. Nothing heavy is imported until a test needs it."""

import os
from pathlib import Path

# vLLM reads these when it is imported: an engine in this process, a small KV cache,
# no network, no usage report. What the caller has set already stays.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

# No deadline: on shared cores the time of one example says nothing. CI repeats the same
# examples every time, so that it fails only for what a change did.
settings.register_profile("vllm-dlm", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("vllm-dlm")

TESTS = Path(__file__).parent
GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Where tests run in several processes (`make test`), those of a folder stay
        # together: they share engines and servers.
        group = item.path.relative_to(TESTS).parts[0]
        item.add_marker(pytest.mark.xdist_group(group))
    marked = [item for item in items if any(map(item.get_closest_marker, GPUS_NEEDED))]
    if not marked:
        return
    import torch

    present = torch.cuda.device_count()
    for item in marked:
        needed = max(n for m, n in GPUS_NEEDED.items() if item.get_closest_marker(m))
        if present < needed:
            reason = f"needs {needed} CUDA GPU(s), this machine has {present}"
            item.add_marker(pytest.mark.skip(reason=reason))
