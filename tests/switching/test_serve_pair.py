# SPDX-License-Identifier: Apache-2.0
"""The command line of `vllm-dlm serve-pair`: what it refuses before anything starts."""

from __future__ import annotations

import pytest
from switching.reference import write_llama

from vllm_dlm.cli.command import main
from vllm_dlm.switching.server import serve_arguments


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says when it ends with status 2."""
    try:
        status = main(["serve-pair", *words])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    return capsys.readouterr().err


def test_tau_has_no_default(capsys):
    assert "--tau" in refused(capsys, "small", "large")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tau", "-1"], "tau: Input should be greater than or equal to 0"),
        (["--tau", "1", "--window", "20"], "min_tokens (10) must be at least window"),
        (["--tau", "1", "--unit", "ban"], "'bits' or 'nats'"),
        (["--tau", "1", "--engine-args", "{"], "--engine-args: not a JSON object"),
        (["--tau", "1", "--serve-args", "3"], "not a JSON object but int"),
        (["--tau", "1", "--serve-args", '{"ports": 1}'], "Did you mean 'port'"),
        (["--tau", "1", "--serve-args", '{"port": "x"}'], "--port"),
        (["--tau", "1", "--serve-args", '{"tokens_only": true}'], "tokens_only"),
        (["--tau", "1", "--small-args", '{"dtipe": 1}'], "options of the small engine"),
        (["--tau", "1", "--stop-token-id", "500"], "ids go from 0 to 127"),
    ],
)
def test_options(capsys, folders, words, message):
    assert message in refused(capsys, *map(str, folders), *words)


def test_models_of_different_vocabularies(capsys, folders, tmp_path):
    other = write_llama(tmp_path, seed=3, layers=1)
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"Ada"', '"Eve"'))
    said = refused(capsys, str(folders[0]), str(other), "--tau", "1")
    assert "have different tokenizers" in said and "Both models must share one" in said


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["serve-pair", "--help"])
    text = capsys.readouterr().out
    for part in ("--tau", "ead_tau", "vllm_xargs", "segments", "25 % and 65 %"):
        assert part in text


def test_options_of_the_http_side():
    args = serve_arguments(
        "model",
        {
            "port": 81,
            "api_key": "secret",
            "uvicorn-log-level": "warning",
            "enable_request_id_headers": True,
            "served_model_name": "a+b",
        },
    )
    assert (args.port, args.api_key, args.uvicorn_log_level) == (
        81,
        ["secret"],
        "warning",
    )
    assert args.enable_request_id_headers
    assert args.served_model_name == ["a+b"]


def test_lists_of_the_http_side():
    lists = {
        "api_key": ["one", "two"],
        "served_model_name": ["a", "b"],
        "middleware": ["c.d", "e.f"],
        "allowed_origins": ["http://localhost"],
    }
    args = vars(serve_arguments("model", lists))
    assert {name: args[name] for name in lists} == lists
