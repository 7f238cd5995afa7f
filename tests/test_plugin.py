# SPDX-License-Identifier: Apache-2.0
"""Registration: once or often, on or off, and light where it must be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import fast

from vllm_dlm import plugin
from vllm_dlm.model_executor.models.tables import ARCHITECTURES, HF_CONFIGS
from vllm_dlm.patches import ledger as patches
from vllm_dlm.registry import load


def run_python(code, **env):
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_register_twice_is_harmless(monkeypatch):
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    monkeypatch.setattr(plugin, "_registered", False)
    plugin.register()
    wrapped, count = EngineArgs.create_engine_config, len(patches.applied())
    monkeypatch.setattr(plugin, "_registered", False)
    plugin.register()
    assert plugin.is_registered()
    assert plugin.problems == []
    assert EngineArgs.create_engine_config is wrapped
    assert len(patches.applied()) == count
    assert set(ARCHITECTURES) <= set(ModelRegistry.get_supported_archs())
    for model_type, target in HF_CONFIGS.items():
        assert _CONFIG_REGISTRY[model_type] is load(target)
        # Not the same where a trainer gives a family another name.
        assert _CONFIG_REGISTRY[model_type].model_type in HF_CONFIGS
    for architecture in ARCHITECTURES:
        assert MODELS_CONFIG_MAP[architecture].__name__ == "DlmModelConfig"


# Both named: whoever runs the tests may have set them otherwise.
LOGS = [
    ({"VLLM_CONFIGURE_LOGGING": "1", "VLLM_LOGGING_LEVEL": "INFO"}, 1),
    ({"VLLM_LOGGING_LEVEL": "WARNING"}, 0),
    ({"VLLM_CONFIGURE_LOGGING": "0"}, 0),
]


@pytest.mark.parametrize(("log", "times"), fast(LOGS[0], of=LOGS), ids=str)
def test_what_we_log_is_shown_as_vllms_log(log, times):
    """Its handler and its level, once, and set after the plugin was loaded."""
    code = (
        "from vllm_dlm import plugin\nplugin.register()\n"
        "from vllm.logger import _configure_vllm_root_logger, init_logger\n"
        "_configure_vllm_root_logger()\n"
        "init_logger('vllm_dlm.somewhere').info('heard')"
    )
    assert run_python(code, **log).count("heard") == times


def test_reading_a_config_imports_no_vllm():
    heavy = run_python(
        "import sys\nfrom vllm_dlm.model_executor.models.tables import HF_CONFIGS\n"
        "from vllm_dlm.registry import load\n"
        "for target in HF_CONFIGS.values(): load(target)\n"
        "print(*sys.modules.keys() & {'vllm'})"
    )
    assert heavy == []


def test_disabled_registers_nothing(monkeypatch):
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setenv("VLLM_DLM_DISABLE", "1")
    plugin.register()
    assert not plugin.is_registered()


def test_importing_the_plugin_is_light():
    heavy = run_python(
        "import sys, vllm_dlm, vllm_dlm.plugin, vllm_dlm.cli.command\n"
        "print(*sys.modules.keys() & {'torch', 'vllm', 'transformers', 'pydantic'})"
    )
    assert heavy == []


def test_listing_strategy_names_imports_none_of_them():
    loaded = run_python(
        "import sys\nfrom vllm_dlm.strategies import STRATEGIES\n"
        "names = STRATEGIES.names()\nprint(len(names))\n"
        "print(*(n for n in names if f'vllm_dlm.strategies.{n}' in sys.modules))"
    )
    assert int(loaded[0]) >= 20 and not loaded[1:]


@pytest.mark.parametrize(
    ("version", "is_problem"),
    [
        ("0.32.0", False),
        ("0.32.0+cpu", False),
        ("0.33.1", False),
        ("0.34.0", True),
        ("0.31.2", True),
        ("dev", True),
    ],
)
def test_version_range(monkeypatch, version, is_problem):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    problem = plugin.version_problem()
    assert (problem is not None) == is_problem
    if problem:
        assert version in problem and plugin.SUPPORTED_VLLM in problem


def test_a_step_that_fails_is_recorded_and_the_rest_goes_on(monkeypatch):
    def fail():
        raise RuntimeError("no such symbol")

    steps = []
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "problems", [])
    monkeypatch.setattr(plugin, "_register_models", fail)
    monkeypatch.setattr(plugin, "_wrap_front_end", lambda: steps.append("front end"))
    plugin.register()
    assert steps == ["front end"]
    assert plugin.problems == ["fail: no such symbol"]


@pytest.mark.parametrize(("model", "warms_up"), [("llada", False), ("llama", True)])
def test_vllms_warm_up_is_left_out_for_diffusion_models(model, warms_up):
    """It schedules what they do not serve; a GPU's worker runs it by default."""
    from vllm.engine.arg_utils import EngineArgs

    folder = Path(plugin.__file__).parent / f"assets/{model}-tiny"
    config = EngineArgs(str(folder)).create_engine_config()
    assert config.kernel_config.enable_jit_warmup is warms_up
