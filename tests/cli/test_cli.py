# SPDX-License-Identifier: Apache-2.0
"""Flags of `vllm serve` and the `vllm-dlm` command, without an engine."""

import argparse
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import pytest

from vllm_dlm.admission import body_guard
from vllm_dlm.cli import command as cli
from vllm_dlm.config import aliases
from vllm_dlm.config.options import REQUEST_OPTIONS, SERVER_ONLY, DlmConfig
from vllm_dlm.entrypoints.flags import add_engine_arguments
from vllm_dlm.patches import flags
from vllm_dlm.patches.themes import apply_plugin_patches
from vllm_dlm.steering.options import SteerConfig
from vllm_dlm.strategies import STRATEGIES


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch, tmp_path):
    """A stand-in for the built-in model's folder."""
    apply_plugin_patches()
    folder = tmp_path / "assets" / "llada-tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llada"}')
    monkeypatch.setattr(aliases, "files", lambda package: tmp_path)
    return str(folder)


@pytest.fixture(scope="module")
def parser():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    apply_plugin_patches()
    return EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm serve"))


def engine_args(parser, *argv):
    from vllm.engine.arg_utils import EngineArgs

    # The default model is on the hub, and tests have no network.
    argv = ("--model", "llada-tiny", *argv)
    return EngineArgs.from_cli_args(parser.parse_args(list(argv)))


def test_flags_are_folded_into_additional_config(parser):
    args = engine_args(
        parser,
        *("--dlm-strategy", "learn2pd", "--dlm-strategy-config", '{"threshold": 0.5}'),
        *("--dlm-block-length", "16", "--dlm-cache", "dual", "--dlm-steps", "8"),
        *("--dlm-max-canvas", "64", "--dlm-filter-dir", "/filters"),
        *("--dlm-reference-exact", "--no-dlm-online-learning"),
        *("--additional-config", '{"other": 1}'),
    )
    assert args.additional_config == {
        "other": 1,
        "dlm": {
            "strategy": "learn2pd",
            "strategy_config": {"threshold": 0.5},
            "block_length": 16,
            "cache": "dual",
            "steps": 8,
            "max_canvas": 64,
            "filter_dir": "/filters",
            "reference_exact": True,
            "online_learning": False,
        },
    }


def test_no_flag_leaves_no_trace(parser):
    assert engine_args(parser).additional_config == {}
    args = engine_args(parser, "--additional-config", '{"dlm": {"steps": 4}}')
    assert args.additional_config == {"dlm": {"steps": 4}}


def test_dotted_parameters(parser):
    args = engine_args(
        parser, "--dlm-strategy", "factor", "--dlm-strategy-config.factor", "2.0"
    )
    assert args.additional_config["dlm"]["strategy_config"] == {"factor": 2.0}


def test_a_flag_that_changes_the_strategy_drops_the_others_parameters(parser):
    config = '{"dlm": {"strategy": "factor", "strategy_config": {"factor": 2}}}'
    argv = ("--additional-config", config, "--dlm-strategy")
    same = engine_args(parser, *argv, "factor").additional_config["dlm"]
    assert same["strategy_config"] == {"factor": 2}
    changed = engine_args(parser, *argv, "static").additional_config["dlm"]
    assert changed == {"strategy": "static"}


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (("--dlm-strategy", "nope"), ["--dlm-strategy", "learn2pd", "threshold"]),
        (("--dlm-strategy-config", "{"), ["--dlm-strategy-config", "JSON"]),
        (("--dlm-block-length", "0"), ["--dlm-block-length", "from 1 to 1024"]),
        (("--dlm-cache", "most"), ["--dlm-cache", "'dual'"]),
        (("--dlm-steps", "few"), ["--dlm-steps", "integer"]),
    ],
)
def test_wrong_values_end_the_parser(parser, capsys, argv, fragments):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(list(argv))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(fragment in message for fragment in fragments)


@pytest.mark.parametrize("options", [DlmConfig, SteerConfig])
def test_help_teaches(parser, options):
    group = next(g for g in parser._action_groups if g.title == options.__name__)
    assert len(group._group_actions) == len(options.model_fields)
    assert all(len(action.help) > 40 for action in group._group_actions)
    parser.format_help()


def test_alias_is_resolved_and_served_under_its_own_name(parser, tiny_model):
    args = engine_args(parser)
    assert args.model == tiny_model
    assert args.served_model_name == ["llada-tiny"]
    named = engine_args(parser, "--served-model-name", "x")
    assert named.served_model_name == ["x"]


def serve(**options):
    options = {"model_tag": None, "model": "m", "additional_config": {}} | options
    check = flags.validate_serve
    args = argparse.Namespace(**options)
    seen = []
    check(lambda self, args: seen.append(args))(SimpleNamespace(name="serve"), args)
    return seen[0]


def test_serve_checks_before_anything_starts(capsys, monkeypatch):
    args = serve(dlm_strategy="factor", dlm_strategy_config={"factor": 2.0})
    # API server processes read this before they load plugins.
    assert args.additional_config["dlm"]["strategy"] == "factor"
    with pytest.raises(SystemExit) as caught:
        serve(dlm_strategy="factor", dlm_strategy_config={"threshold": 0.5})
    assert caught.value.code == 2
    assert "vllm serve: error" in capsys.readouterr().err

    monkeypatch.setattr(aliases, "cached_folder", lambda *args: None)
    monkeypatch.setattr(aliases, "_hub_answers", lambda *args: False)
    with pytest.raises(SystemExit):
        serve(model_tag="llada")
    error = capsys.readouterr().err
    assert "hf download" in error and "Traceback" not in error


def test_plain_engine_args_are_resolved_and_checked(monkeypatch, tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    built = []

    def original(self):
        built.append(self)
        hf_config = SimpleNamespace(dlm_class=dlm_class)
        return SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))

    create = flags.create_engine_config(original)
    monkeypatch.setitem(body_guard.process, "ours", False)
    dlm_class = "full"
    args = SimpleNamespace(
        model="llada-tiny",
        tokenizer="llada-tiny",
        revision=None,
        tokenizer_revision=None,
        hf_token=None,
        served_model_name=None,
        additional_config={"dlm": {"strategy": "static"}},
        speculative_config=None,
    )
    create(args)
    assert (args.model, args.tokenizer) == (tiny_model, tiny_model)
    assert args.served_model_name == ["llada-tiny"]
    assert body_guard.process["ours"]

    args.additional_config = {"dlm": {"strategi": "static"}}
    with pytest.raises(ValueError, match="Did you mean 'strategy'"):
        create(args)
    dlm_class = None
    args.additional_config = {"dlm": {"strategy": "static"}}
    with pytest.raises(ValueError, match="is not one"):
        create(args)
    args.additional_config = {}
    create(args)
    assert not body_guard.process["ours"]
    # Offline mode looks the model up while EngineArgs is built.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert EngineArgs(model="llada-tiny").model == tiny_model


def test_llm_folds_its_keywords(monkeypatch):
    import vllm

    from vllm_dlm.entrypoints.llm import LLM

    seen = {}
    monkeypatch.setattr(
        vllm.LLM, "__init__", lambda self, model, **kwargs: seen.update(kwargs)
    )
    LLM("m", dlm_strategy="factor", dlm_strategy_config={"factor": 2.0}, seed=3)
    dlm = {"strategy": "factor", "strategy_config": {"factor": 2.0}}
    assert seen == {"seed": 3, "additional_config": {"dlm": dlm}}
    with pytest.raises(TypeError, match="Did you mean 'dlm_strategy'"):
        LLM("m", dlm_stratgy="factor")
    with pytest.raises(ValueError, match="threshold"):
        LLM("m", dlm_strategy="nope")


def test_every_option_is_a_keyword_of_llm():
    import inspect

    from vllm_dlm.entrypoints.llm import LLM

    names = inspect.signature(LLM.__init__).parameters
    keywords = {name for name in names if name.startswith("dlm_")}
    options = DlmConfig.model_fields | SteerConfig.model_fields
    assert keywords == {f"dlm_{name}" for name in options}
    assert names["dlm_block_length"].annotation == int | Literal["canvas"] | None
    assert names["dlm_steps"].annotation == int | None
    assert [*inspect.signature(LLM).parameters][0] == "model"
    for name, field in options.items():
        shown = names[f"dlm_{name}"]
        assert shown.kind is shown.KEYWORD_ONLY
        assert shown.default is None
        assert type(None) in get_args(shown.annotation)
        assert f"        dlm_{name}: {(field.description or '')[:30]}" in LLM.__doc__


def test_an_option_is_declared_in_one_place():
    """A field says what its flag and its error messages need to know of it."""
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    actions = {action.dest: action for action in parser._actions}
    for name, field in (DlmConfig.model_fields | SteerConfig.model_fields).items():
        flag = actions[f"dlm_{name}"]
        assert flag.help == field.description
        assert (flag.metavar is None) == (field.annotation is bool)
    assert actions["dlm_cache"].metavar == "{none,prefix,dual,vicinity,window}"
    assert actions["dlm_block_length"].metavar == "{N,canvas}"
    assert actions["dlm_strategy"].metavar == "NAME"
    assert actions["dlm_eotp_threshold"].metavar == "N"
    assert actions["dlm_trajectory_dir"].metavar == "FOLDER"
    assert actions["dlm_tccf"].metavar == "JSON"
    only = {"max_canvas", "commit", "compile", "async_blocks", "online_learning"}
    only |= {"filter_dir", "record_traces", "trajectory_dir"}
    only |= {"soft_inputs", "diffusion_gemma"}
    assert set(SERVER_ONLY) == only
    assert {*SERVER_ONLY, *REQUEST_OPTIONS} == set(DlmConfig.model_fields)


def test_strategies_command(capsys):
    assert cli.main(["strategies"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in ("static", "threshold", "learn2pd"))
    assert cli.main(["strategies", "threshold"]) == 0
    assert "float" in capsys.readouterr().out
    for name, use in (
        ("static", "followed"),
        ("threshold", "followed with at_least 'scheduled', else refused"),
        ("factor", "not for it, and refused"),
    ):
        assert cli.main(["strategies", name]) == 0
        assert f"steps, steps_per_block: {use}\n" in capsys.readouterr().out
    for name in ("klass", "joint"):
        assert cli.main(["strategies", name]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        for preset, published in STRATEGIES[name].Params.presets.items():
            assert preset in shown
            assert published.source.split()[0] in shown
    assert cli.main(["strategies", "nope"]) == 2
    assert "choose one of" in capsys.readouterr().err


def test_models_command(capsys, monkeypatch):
    monkeypatch.setattr(aliases, "cached_folder", lambda *args: None)
    assert cli.main(["models"]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in aliases.ALIASES)


def test_models_command_shows_a_folder_s_own_options(capsys, tiny_model):
    folder, config = Path(tiny_model), {"model_type": "llada"}
    file = folder / "config.json"
    options = {"strategy": "static", "steps_per_block": 4, "block_length": 8}
    file.write_text(json.dumps(config | {"dlm_options": options}))
    assert cli.main(["models", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "full attention, block 8, strategy static" in shown
    assert '"steps_per_block": 4' in shown
    file.write_text(json.dumps(config))
    assert cli.main(["models", "llada-tiny"]) == 0
    assert "block 32, strategy threshold" in capsys.readouterr().out
    file.write_text(json.dumps(config | {"dlm_options": {"strategy": "statik"}}))
    assert cli.main(["models", str(folder)]) == 2
    assert "statik" in capsys.readouterr().err
    file.write_text('{"model_type": "gpt2"}')
    for model, reason in ((str(folder), "llada2_moe"), ("nothing", "name a folder")):
        assert cli.main(["models", model]) == 2
        assert reason in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("strategies", "models", "doctor", "train"))


def test_tools_are_imported_only_when_chosen(monkeypatch, capsys):
    def add_arguments(parser):
        parser.add_argument("--steps", type=int)

    ran = []
    module = SimpleNamespace(
        add_arguments=add_arguments, run=lambda args: ran.append(args.steps)
    )
    monkeypatch.setitem(sys.modules, "fake_tool", module)
    monkeypatch.setattr(cli, "TRAINABLE", {"llada-tiny": ("fake_tool", "it")})
    monkeypatch.setattr(cli, "TOOLS", {"traces": ("no_such_tool", "none")})
    assert cli.main(["train", "llada-tiny", "--steps", "5"]) == 0
    assert ran == [5]
    with pytest.raises(SystemExit):
        cli.main(["traces"])


def test_doctor_finds_problems(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_DLM_DISABLE", "1")
    assert cli.main(["doctor"]) == 1
    assert "VLLM_DLM_DISABLE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "/no"), 2, "error: .*'/no'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_end_is_one_line(monkeypatch, capsys, raised, status, said):
    def fail(*_):
        raise raised

    monkeypatch.setattr(cli, "_show_models", fail)
    assert cli.main(["models"]) == status
    assert re.fullmatch(f"vllm-dlm: {said}\\n", capsys.readouterr().err)


def test_doctor_names_what_this_vllm_lacks(monkeypatch, capsys):
    from vllm.utils import cpu_triton_utils
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    cli.main(["doctor"])
    assert "BAD patched" not in capsys.readouterr().out
    monkeypatch.delattr(cpu_triton_utils, "_expand_kernel_impl")
    monkeypatch.delattr(GPUModelRunner, "_bookkeeping_sync")
    assert cli.main(["doctor"]) == 1
    found = " ".join(capsys.readouterr().out.split())
    assert found.count("BAD patched") == 2
    for name in ("cpu_triton_utils:_expand_kernel_impl", "._bookkeeping_sync"):
        assert f"{name}, which vLLM" in found


def test_models_command_with_a_damaged_checkpoint(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("[")
    damaged = {"dream": str(tmp_path)}
    monkeypatch.setattr(aliases, "local_folder", damaged.get)
    assert cli.main(["models"]) == 0
    assert "its config.json cannot be read" in capsys.readouterr().out
