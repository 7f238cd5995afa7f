# SPDX-License-Identifier: Apache-2.0
"""A request's options are read once, wherever they are needed; its files not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.cases import make_prompt
from engine.harness import Engine, params
from engine.model_files import filter_weights
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from vllm_dlm.config import request as merging
from vllm_dlm.config.carried import CARRIED
from vllm_dlm.strategies import learn2pd_filter, token_frequencies

PROMPTS = [make_prompt(5 + 3 * number, number) for number in range(3)]
OPTIONS = {"strategy": "static", "steps": 4, "block_length": 8}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is read: the options of requests, and the paths of strategies' files."""
    found: list[Any] = []
    read_request = merging.read_request

    def count(extra_args: Any) -> Any:
        found.append(extra_args)
        return read_request(extra_args)

    monkeypatch.setattr(merging, "read_request", count)
    for module in (learn2pd_filter, token_frequencies):
        read_file = module.read_safetensors

        def count_file(path: Any, *rest: Any, read_file: Any = read_file) -> Any:
            found.append(path)
            return read_file(path, *rest)

        monkeypatch.setattr(module, "read_safetensors", count_file)
    return found


@pytest.fixture(scope="module")
def with_a_filter(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    file: Path = tmp_path_factory.mktemp("filter") / "filter.safetensors"
    learn2pd_filter.Filter(**filter_weights(16)).save(file)
    named = {"strategy": "learn2pd", "strategy_config": {"filter": str(file)}}
    return engines(dlm=named | {"block_length": 16})


def test_options_are_read_once_per_request(engine: Engine, read: list[Any]):
    asked = {"dlm": OPTIONS}
    sampling = params(16)
    sampling.extra_args = asked
    before = repr(sampling)
    engine.run(PROMPTS, sampling)
    assert read == [asked] * len(PROMPTS)
    # One object may serve many requests, and engines: it is as it was.
    assert sampling.extra_args is asked
    assert repr(sampling) == before


def test_several_outputs_share_what_was_read(engine: Engine, read: list[Any]):
    engine.run(PROMPTS[:1], params(16, n=3, temperature=0.8, seed=1, dlm=OPTIONS))
    assert read == [{"dlm": OPTIONS}]


def test_a_filter_of_the_servers_is_read_once(with_a_filter: Engine, read: list[Any]):
    """And not again for a request with parameters of its own, nor for a table of pc."""
    pc = params(16, dlm={"strategy": "pc", "block_length": 16})
    with_a_filter.run(PROMPTS[:2], [params(16), pc])
    read.clear()
    own = params(16, dlm={"strategy_config": {"threshold": 0.5}})
    with_a_filter.run(PROMPTS, [params(16), own, pc])
    assert len(read) == len(PROMPTS)
    assert all(isinstance(each, dict) for each in read), "options, no file"


def test_a_changed_object_is_read_anew(engine: Engine, read: list[Any]):
    sampling = params(16, ignore_eos=True, dlm=dict(OPTIONS))
    [four] = engine.run(PROMPTS[:1], sampling)
    sampling.extra_args["dlm"]["steps"] = 16
    [sixteen] = engine.run(PROMPTS[:1], sampling)
    assert (four.forwards, sixteen.forwards) == (4, 16)
    assert len(read) == 2


def test_what_travels_cannot_be_sent(engine: Engine):
    sampling = SamplingParams(max_tokens=8, extra_args={CARRIED: {"strategy": "pc"}})
    with pytest.raises(VLLMValidationError, match="unknown option 'dlm_carried'"):
        engine.run(PROMPTS[:1], sampling)


def test_a_request_made_by_hand_is_served_the_same(engine: Engine, read: list[Any]):
    """It comes by no front end of ours: scheduler and worker read its options."""
    sampling = params(16, dlm=OPTIONS)
    [wanted] = engine.run(PROMPTS[:1], sampling)
    read.clear()
    core = engine.llm.llm_engine
    made = core.input_processor.process_inputs(
        "by-hand",
        {"type": "token", "prompt_token_ids": list(PROMPTS[0])},
        sampling,
        supported_tasks=core.get_supported_tasks(),
    )
    assert isinstance(made, EngineCoreRequest)
    assert made.sampling_params is not None and made.sampling_params.extra_args
    assert made.sampling_params.extra_args.keys() == {CARRIED}
    made.sampling_params.extra_args = {"dlm": OPTIONS}
    core.add_request("by-hand", made, sampling)
    outputs = []
    while engine.busy:
        outputs = engine.step() or outputs
    [result] = outputs
    assert list(result.outputs[0].token_ids) == wanted.tokens
    assert read == [{"dlm": OPTIONS}] * 3, "once as it is made, twice by the engine"
