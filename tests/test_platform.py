# SPDX-License-Identifier: Apache-2.0
"""The CPU platform and the ledger of patches."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.platforms import vllm_version_matches_substr

if not vllm_version_matches_substr("cpu"):
    pytest.skip("needs a CPU build of vLLM", allow_module_level=True)

import torch

from vllm_dlm.patches import cpu_runner, themes
from vllm_dlm.patches import ledger as patches
from vllm_dlm.platform import platform_plugin
from vllm_dlm.vllm_objects import replace


def run_python(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter; the last line it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


# The plugin ---------------------------------------------------------------------


def test_plugin_names_the_platform(monkeypatch):
    monkeypatch.delenv("VLLM_DLM_DISABLE", raising=False)
    assert platform_plugin() == "vllm_dlm.platform.DlmCpuPlatform"
    monkeypatch.setenv("VLLM_DLM_DISABLE", "1")
    assert platform_plugin() is None


def test_plugin_leaves_other_builds_alone(monkeypatch):
    monkeypatch.delenv("VLLM_DLM_DISABLE", raising=False)
    monkeypatch.setattr(
        "vllm.platforms.vllm_version_matches_substr", lambda substr: False
    )
    assert platform_plugin() is None


def test_platform_is_vllms_cpu_platform_with_a_ray_device():
    from vllm.platforms.cpu import CpuPlatform

    from vllm_dlm.platform import DlmCpuPlatform

    assert issubclass(DlmCpuPlatform, CpuPlatform)
    platform = DlmCpuPlatform()
    assert platform.is_cpu() and not platform.is_out_of_tree()
    assert platform.device_name == CpuPlatform.device_name
    assert platform.ray_device_key == "GPU"


def test_importing_the_package_is_cheap():
    code = (
        "import sys, vllm_dlm, vllm_dlm.platform, vllm_dlm.patches.ledger;"
        "print(sorted({'torch', 'vllm', 'numba'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


@pytest.mark.slow
def test_the_plugin_switched_off_leaves_vllms_platform():
    code = (
        "from vllm.platforms import current_platform;"
        "print(type(current_platform).__module__)"
    )
    assert run_python(code, VLLM_DLM_DISABLE="1") == "vllm.platforms.cpu"


# The ledger ---------------------------------------------------------------------


class Victim:
    def method(self):
        """Of the victim."""
        return "method"

    @classmethod
    def of_class(cls):
        return cls.__name__

    @staticmethod
    def static():
        return "static"

    @property
    def prop(self):
        return "prop"


@pytest.mark.parametrize(
    ("attribute", "call"),
    [
        ("method", lambda: Victim().method()),
        ("of_class", lambda: Victim.of_class()),
        ("static", lambda: Victim.static()),
        ("prop", lambda: Victim().prop),
    ],
)
def test_wrap_keeps_the_kind_and_applies_once(monkeypatch, attribute, call):
    symbol = f"{__name__}:Victim.{attribute}"
    entry = patches.Patch(
        symbol,
        why="",
        upstream="",
        drop_when="",
        make=lambda original: lambda *a: original(*a) + "!",
    )
    monkeypatch.setitem(patches.PATCHES, symbol, entry)
    monkeypatch.setattr(patches, "_applied", [])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    raw = inspect.getattr_static(Victim, attribute)
    before = call()
    try:
        for _ in range(2):
            patches.wrap(symbol)
        assert call() == before + "!"
        assert type(inspect.getattr_static(Victim, attribute)) is type(raw)
        assert patches.applied() == [entry]
    finally:
        setattr(Victim, attribute, raw)


def test_wrap_refuses_what_is_not_in_the_ledger_or_not_in_vllm(monkeypatch):
    with pytest.raises(ValueError, match="patch ledger"):
        patches.wrap("vllm:nothing")
    symbol = "vllm.config.vllm:VllmConfig.no_such_method"
    entry = patches.Patch(symbol, why="", upstream="", drop_when="", make=lambda _: _)
    monkeypatch.setitem(patches.PATCHES, symbol, entry)
    with pytest.raises(RuntimeError, match="does not have"):
        patches.wrap(symbol)


def test_a_workers_gate_opens_for_diffusion_models_only(monkeypatch):
    from vllm.v1.worker import gpu_worker

    def look(self, vllm_config, rank=0):
        seen.append(gpu_worker.HAS_TRITON)
        if rank:
            raise ValueError("no such rank")

    seen: list = []
    monkeypatch.setattr(patches, "_applied", [])
    monkeypatch.setattr(gpu_worker.Worker, "__init__", look)
    # vLLM 0.32 has no gate there.
    monkeypatch.setattr(gpu_worker, "HAS_TRITON", False, raising=False)
    cpu_runner.apply_worker_patches()
    second, first = (
        SimpleNamespace(use_v2_model_runner=is_v2) for is_v2 in (True, False)
    )
    gpu_worker.Worker(second)
    gpu_worker.Worker(vllm_config=first, rank=0)
    with pytest.raises(ValueError, match="no such rank"):
        gpu_worker.Worker(second, 1)
    assert seen == [True, False, True] and gpu_worker.HAS_TRITON is False


def test_replace_refuses_what_vllm_does_not_read():
    runner = SimpleNamespace(longest=7)
    replace(runner, "longest", 9)
    assert runner.longest == 9
    with pytest.raises(RuntimeError, match=r"SimpleNamespace\.shortest, which vLLM"):
        replace(runner, "shortest", 1)


def test_every_entry_says_why():
    for symbol, patch in themes.every_patch().items():
        assert symbol == patch.symbol
        assert patch.why and patch.how and patch.upstream and patch.drop_when


UPSTREAM = Path(__file__).parent.parent / "docs/upstream.md"


def test_every_mended_fault_has_a_text_for_vllm():
    """A section of docs/upstream.md: an entry names it, or the code that needs none."""
    headings = re.findall(r"^## (.+)$", UPSTREAM.read_text("utf-8"), flags=re.M)
    anchors = {re.sub(r"[^\w\- ]", "", heading).lower() for heading in headings}
    anchors = {f"docs/upstream.md#{anchor.replace(' ', '-')}" for anchor in anchors}
    entries = {patch.upstream for patch in themes.every_patch().values()}
    package = Path(themes.__file__).parents[1]
    named = {
        name
        for file in package.rglob("*.py")
        for name in re.findall(r"docs/upstream\.md#[\w-]+", file.read_text("utf-8"))
    }
    assert entries <= anchors
    assert named == anchors


def test_entries_are_listed_without_vllm():
    code = (
        "import sys; from vllm_dlm.patches.themes import every_patch;"
        "assert len(every_patch()) > 18;"
        "print(sorted({'vllm', 'numba', 'transformers'} & set(sys.modules)))"
    )
    assert run_python(code) == "[]"


def test_no_more_is_wrapped_than_diffusion_models_need():
    """What mends faults of vLLM goes with these."""
    found = themes.every_patch().values()
    assert sum(not patch.mends_vllm for patch in found) <= 18


def test_a_symbol_has_one_entry(monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", {})
    said = {"why": "", "upstream": "", "drop_when": ""}
    patches.patch("vllm:nothing", **said)(lambda original: original)
    with pytest.raises(ValueError, match="'vllm:nothing' is in the patch ledger"):
        patches.patch("vllm:nothing", **said)(lambda original: original)


RUNNERS = """
from types import SimpleNamespace
from vllm_dlm.patches.cpu_runner import apply_cpu_patches
apply_cpu_patches()
apply_cpu_patches()
assert len(applied()) == len(set(applied())) > 0
def config(is_diffusion):
    config = object.__new__(VllmConfig)
    config.model_config = SimpleNamespace(is_diffusion=is_diffusion)
    config.attention_config = SimpleNamespace(hisparse_config=None)
    config.additional_config = {}
    config._get_v2_model_runner_unsupported_features = lambda: []
    return config
config(True)._validate_v2_model_runner()
other = config(False)
other.model_config.is_hybrid = other.model_config.uses_mrope = True
other.watermark_config = other.speculative_config = None
other.parallel_config = SimpleNamespace(
    decode_context_parallel_size=1, enable_batch_sharded_sampling=False
)
try:
    other._validate_v2_model_runner()
except ValueError as error:
    assert "models with a recurrent state, positions of" in str(error), error
    assert "on a CPU without Triton: unset it" in str(error), error
else:
    raise AssertionError
runners = [config(True).use_v2_model_runner, config(False).use_v2_model_runner]
"""


@pytest.mark.slow
def test_our_engines_get_the_runner_that_they_were_made_for():
    """Where V2 is usual."""
    code = """
import vllm.config.vllm as vllm_config
from types import SimpleNamespace
from typing import Any
vllm_config.HAS_TRITON = True
from vllm_dlm.patches import cpu_runner
from vllm_dlm.patches.ledger import wrap
wrap("vllm.config.vllm:VllmConfig.use_v2_model_runner")
def config(additional):
    config = object.__new__(vllm_config.VllmConfig)
    config.model_config = SimpleNamespace(is_diffusion=False)
    config.attention_config = SimpleNamespace(hisparse_config=None)
    config.additional_config = additional
    config._get_v2_model_runner_unsupported_features = lambda: []
    return config.use_v2_model_runner
asked = {}, {"dlm_runner": 1}, {"dlm_runner": 2}
print([config(keys) for keys in asked])
"""
    assert run_python(code) == "[True, False, True]"


ENGINE_CORE = """
import inspect, json
import numba
from vllm.platforms import current_platform
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm_dlm.patches.ledger import applied

found = {"platform": type(current_platform).__module__, "before": bool(applied())}
register_all_kvcache_specs(None)
found["after"] = bool(applied())

from vllm.config import VllmConfig
for _ in range(2):
    current_platform.register_triton_kernel_overrides()
from vllm.v1.worker.gpu import input_batch
from vllm_dlm.kernels.runner_cpu.input_batch import _post_update_kernel
ours = inspect.unwrap(input_batch._post_update_kernel.func)  # fitted to its parameters
"""
SAID = """
found |= {"is our kernel": ours is _post_update_kernel, "runners": runners}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def engine_core() -> dict[str, Any]:
    """What a process is like in which numba was imported, and a worker starts."""
    code = ENGINE_CORE + RUNNERS + SAID
    return json.loads(run_python(code, VLLM_DLM_DISABLE="0", VLLM_PLUGINS="dlm_cpu"))


def test_vllm_picks_the_platform(engine_core: dict[str, Any]):
    assert engine_core["platform"] == "vllm_dlm.platform"


def test_engine_core_applies_the_patches_before_its_scheduler(
    engine_core: dict[str, Any],
):
    """It unpickles its config: of the platform's hooks it calls only this one."""
    assert (engine_core["before"], engine_core["after"]) == (False, True)


def test_only_diffusion_models_get_runner_v2(engine_core: dict[str, Any]):
    assert engine_core["runners"] == [True, False]


def test_kernels_register_after_numba_was_imported(engine_core: dict[str, Any]):
    """vLLM's own registration dies on llvmlite; see the patch ledger."""
    assert engine_core["is our kernel"]


# Ordinary models ------------------------------------------------------------------

GENERATE = """
import json
from vllm import LLM, SamplingParams
llm = LLM(
    model=MODEL,
    skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128,
    max_num_seqs=2, kv_cache_memory_bytes=16 << 20,
)
prompts = [{"prompt_token_ids": list(range(2, 2 + n))} for n in (3, 17, 40)]
params = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
outputs = llm.generate(prompts, params, use_tqdm=False)
tokens = [list(output.outputs[0].token_ids) for output in outputs]
print(json.dumps([llm.llm_engine.vllm_config.use_v2_model_runner, tokens]))
"""


@pytest.mark.slow
def test_autoregressive_model_is_untouched(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    code = f"MODEL = {str(tmp_path)!r}\n{GENERATE}"
    with_plugin, without = (
        json.loads(
            run_python(
                code,
                VLLM_DLM_DISABLE=disabled,
                VLLM_ENABLE_V1_MULTIPROCESSING="0",
                HF_HUB_OFFLINE="1",
            )
        )
        for disabled in "01"
    )
    assert with_plugin == without
    assert with_plugin[0] is False
