# SPDX-License-Identifier: Apache-2.0
"""From flags and keywords to what an engine is told, and what is refused on the way."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dlm.config.aliases import local_folder
from vllm_dlm.entrypoints.flags import prepared
from vllm_dlm.plugin import register
from vllm_dlm.steering import front_end
from vllm_dlm.steering.options import Constant, parse, resolve

TUNED, BASE = (str(local_folder(name)) for name in ("llama-tiny", "llama-tiny-draft"))
CONSTANT = Constant(
    mu=-0.8, keep=0.2, tuned="t", base="b", fit="mean", tokens=5, kept=4
)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "mu.json"
    path.write_text(CONSTANT.model_dump_json())
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


def engine_args(parser: FlexibleArgumentParser, *argv: str) -> EngineArgs:
    return EngineArgs.from_cli_args(parser.parse_args(["--model", TUNED, *argv]))


def test_a_number_a_file_and_what_wins(file):
    assert resolve(parse({"steer_base": "b", "steer_mu": "-1.25"})) == (-1.25, 0.1)
    assert resolve(parse({"steer_base": "b", "steer_mu": 2})) == (2.0, 0.1)
    assert resolve(parse({"steer_base": "b", "steer_mu": file})) == (-0.8, 0.2)
    given = {"steer_base": "b", "steer_mu": file, "steer_keep": 0}
    assert resolve(parse(given)) == (-0.8, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steer_mu": 1}, "dlm_steer_mu without dlm_steer_base"),
        ({"steer_base": "b"}, "needs dlm_steer_mu: .*vllm-dlm train steer-mu"),
        ({"steer_base": "b", "steer_mu": "nan"}, "steer_mu: expected a finite number"),
        ({"steer_base": "b", "steer_mu": True}, "steer_mu: expected a number or the"),
        ({"steer_base": "b", "steer_mu": " "}, "steer_mu: expected a number or the"),
        ({"steer_base": "b", "steer_mu": 1, "steer_keep": 1.5}, "less than or equal"),
        ({"steer_base": "", "steer_mu": 1}, "steer_base: .*at least 1 char"),
        ({"steer_bas": "b"}, "Did you mean 'steer_base'"),
        ("b", "expected options of steering, got 'b'"),
    ],
)
def test_options_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse(given)


def test_a_file_without_a_constant(tmp_path):
    with pytest.raises(ValueError, match="no-such.json.*No such file"):
        resolve(parse({"steer_base": "b", "steer_mu": "no-such.json"}))
    other = tmp_path / "other.json"
    other.write_text('{"mu": "much"}')
    with pytest.raises(ValueError, match="steering constant .*keep: Field required"):
        resolve(parse({"steer_base": "b", "steer_mu": str(other)}))


def test_flags_reach_the_engine(parser, file):
    args = engine_args(
        parser, "--dlm-steer-base", "llama-tiny-draft", "--dlm-steer-mu", "-1.2"
    )
    assert args.additional_config == {
        "dlm_steering": {"steer_base": "llama-tiny-draft", "steer_mu": -1.2}
    }
    config = args.create_engine_config()
    assert config.model_config.architectures == ["DlmSteeredForCausalLM"]
    assert config.additional_config["dlm_steering"] == {
        "base": BASE,
        "mu": -1.2,
        "keep": 0.1,
        "architectures": ["LlamaForCausalLM"],
        "quantization": None,
    }
    # Once more, as a server does.
    assert args.create_engine_config().additional_config == config.additional_config


@pytest.mark.parametrize("mu", ["-1.2", "-.5", "-3", "-1e-1", "-2.5e-1", "0.5"])
def test_negative_numbers_behind_a_flag(parser, mu):
    for behind in ([], ["--seed", "3"]):
        args = parser.parse_args(["--model", TUNED, "--dlm-steer-mu", mu, *behind])
        assert args.dlm_steer_mu == float(mu)
        assert args.model == TUNED
    assert args.seed == 3


def test_keywords_reach_the_engine(monkeypatch, file):
    import vllm

    from vllm_dlm.entrypoints.llm import LLM

    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        vllm.LLM, "__init__", lambda self, model, **kwargs: seen.update(kwargs)
    )
    LLM("m", dlm_steer_base="b", dlm_steer_mu=Path(file), dlm_steer_keep=0.3)
    steering = {"steer_base": "b", "steer_mu": Path(file), "steer_keep": 0.3}
    assert seen == {"additional_config": {"dlm_steering": steering}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--dlm-steer-mu", "nan"), "--dlm-steer-mu: expected a finite number"),
        (("--dlm-steer-keep", "2"), "--dlm-steer-keep: Input should be less"),
        (("--dlm-steer-keep", "few"), "--dlm-steer-keep: Input should be a valid n"),
    ],
)
def test_wrong_values_end_the_parser(parser, capsys, argv, message):
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", TUNED, *argv])
    assert message in capsys.readouterr().err


def test_a_server_checks_before_anything_starts(file):
    given = {"model": "m", "additional_config": {}, "dlm_steer_base": "b"}
    with pytest.raises(ValueError, match="needs dlm_steer_mu"):
        prepared(argparse.Namespace(**given))
    with pytest.raises(ValueError, match="No such file"):
        prepared(argparse.Namespace(**given, dlm_steer_mu="no-such.json"))
    args = prepared(argparse.Namespace(**given, dlm_steer_mu=file))
    assert args.additional_config == {
        "dlm_steering": {"steer_base": "b", "steer_mu": file}
    }


# -- engines that are refused ----------------------------------------------


def create(base: str = BASE, model: str = TUNED, **options: Any) -> Any:
    steering = {"steer_base": base, "steer_mu": -1.0}
    options = {"additional_config": {"dlm_steering": steering}} | options
    return EngineArgs(model=model, **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism: use --tensor-parallel"),
        ({"enable_lora": True}, "does not load adapters.*merge_and_unload"),
        ({"enable_prompt_embeds": True}, "leave out prompt embeddings"),
        ({"load_format": "sharded_state"}, "'sharded_state': use one of auto"),
        ({"hf_overrides": lambda config: config}, "hf_overrides as a dict"),
        (
            {"speculative_config": {"method": "aded"}},
            "does not go with our speculative methods.*ngram",
        ),
        ({"base": "llada-tiny"}, "llada-tiny' does not write token by token"),
        ({"model": "llada-tiny"}, "the tuned model .* does not write token by token"),
        ({"tensor_parallel_size": 2}, "llama-tiny-draft': .*attention heads"),
    ],
)
def test_engines_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


def test_the_architecture_alone_is_no_engine():
    args = EngineArgs(
        model=TUNED, hf_overrides={"architectures": ["DlmSteeredForCausalLM"]}
    )
    with pytest.raises(ValueError, match="name the second one with --dlm-steer-base"):
        front_end.check(args.create_engine_config())


def other_base(folder: Path, **config: Any) -> str:
    """A base with llama-tiny's tokenizer and no weights, which nobody comes to read."""
    values = json.loads((Path(BASE) / "config.json").read_text()) | config
    LlamaConfig(**values).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((Path(BASE) / name).read_text())
    return str(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 136}, "128 tokens and its base .* of 136.*resize_token"),
        ({"max_position_embeddings": 512}, "set --max-model-len 512"),
        (
            {
                "tie_word_embeddings": True,
                "quantization_config": {"quant_method": "awq", "bits": 4}
                | {"group_size": 32, "zero_point": True},
            },
            "quantized .awq.* shares its embedding with its head",
        ),
    ],
)
def test_bases_that_do_not_fit(tmp_path, config, message):
    dtype = {"dtype": torch.float16} if "quantization_config" in config else {}
    with pytest.raises(ValueError, match=message):
        create(base=other_base(tmp_path, **config), **dtype)


def test_another_tokenizer(tmp_path):
    base = other_base(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Ada"], vocabulary["Ben"] = vocabulary["Ben"], vocabulary["Ada"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="different tokenizers: .* 2 of them .*'Ada'"):
        create(base=base)


def test_drafters_of_hidden_states(monkeypatch):
    config = create()
    monkeypatch.setattr(
        config, "speculative_config", argparse.Namespace(method="eagle3")
    )
    with pytest.raises(ValueError, match="'eagle3'.* use one of ngram"):
        front_end.check(config)
