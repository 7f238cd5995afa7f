# SPDX-License-Identifier: Apache-2.0
"""Keys that a reader would take for our options are refused where nobody reads them."""

import inspect

import openai
import pytest
from vllm import SamplingParams
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest

from vllm_dlm.admission.stray_options import (
    EVERYDAY,
    find_stray,
    own_names,
    refuse_best_of,
    refuse_stray,
    refuse_unread,
)
from vllm_dlm.config.foreign_names import FOREIGN, plain
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.messages import OptionError
from vllm_dlm.strategies import STRATEGIES

BODIES = (
    CompletionRequest,
    ChatCompletionRequest,
    BatchChatCompletionRequest,
    ResponsesRequest,
    AnthropicMessagesRequest,
    GenerateRequest,
)
OF_OTHERS = (
    *("foo", "metadata", "user", "safety_identifier", "store", "verbosity", "verbose"),
    *("prediction", "modalities", "reasoning_effort", "web_search_options", "seeds"),
    *("prompt_cache_key", "functions", "function_call", "best_of", "traceparent"),
    *("early_stopping", "num_beams", "do_sample", "api_key", "timeout", "tags", "mode"),
    *("history", "cache", "filter", "schedule", "window", "session", "conversation"),
)


def message(call, *args, **kwargs):
    with pytest.raises(OptionError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_the_best_of_many_texts():
    for sent, count in (({}, 2), ({"best_of": 1}, None), ({"best_of": 3}, 3)):
        refuse_best_of(sent, count)
    for sent in ({"best_of": 2}, {"best_of": "2"}, {"best_of": [1]}):
        assert "vllm-dlm search" in message(refuse_best_of, sent, 1)


def test_fields_of_vllm_and_of_clients_are_none_of_ours():
    names = {*OF_OTHERS, *SamplingParams.__struct_fields__}
    for body in BODIES:
        names.update(body.model_fields)
    client = openai.OpenAI(api_key="none")
    for create in (
        client.completions.create,
        client.chat.completions.create,
        client.responses.create,
    ):
        names.update(inspect.signature(create).parameters)
    names -= {"guided_decoding_backend", "extra_body"}
    assert not [name for name in names if find_stray((name,), ours=True)]
    assert find_stray(names, ours=False) is None


def test_every_name_of_ours_is_recognised_without_its_prefix():
    for name in own_names():
        assert find_stray((name,), ours=True, everyday=True) == (name, f"dlm_{name}")
        found = find_stray((name,), ours=True)
        assert found is None if name in EVERYDAY else found == (name, f"dlm_{name}")
        assert find_stray((name,), ours=False) is None
        assert find_stray((f"dlm_{name}",), ours=False)
    assert own_names() >= EVERYDAY


def test_what_is_advised_exists():
    read = own_names() | {"max_tokens"}
    for name, meaning in FOREIGN.items():
        assert plain(name) == name
        assert " " in meaning or meaning.removeprefix("dlm_") in read, name
    assert not FOREIGN.keys() & set(DlmConfig.model_fields)
    assert not [n for n in STRATEGIES if FOREIGN.keys() & _params(n)]


def _params(strategy):
    return set(STRATEGIES[strategy].Params.model_fields)


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("threshold", "'dlm_threshold'"),
        ("dlm-threshold", "'dlm_threshold'"),
        ("dlmThreshold", "'dlm_threshold'"),
        ("dlm.threshold", "'dlm_threshold'"),
        ("DLM_THRESHOLD", "'dlm_threshold'"),
        (" dlm_threshold", "'dlm_threshold'"),
        ("treshold", "'dlm_threshold'"),
        ("blockLength", "'dlm_block_length'"),
        ("block_lenght", "'dlm_block_length'"),
        ("steps", "'dlm_steps'"),
        ("gen_length", "'max_tokens'"),
        ("max_new_tokens", "'max_tokens'"),
        ("remasking", "'dlm_strategy'"),
        ("unmasking_strategy", "'dlm_strategy'"),
        ("dllm_algorithm", "'dlm_strategy'"),
        ("block_size", "'dlm_block_length'"),
        ("denoising_steps", "'dlm_steps'"),
        ("diffusion_steps", "'dlm_steps'"),
        ("num_steps", "'dlm_steps'"),
        ("confidence_threshold", "'dlm_threshold'"),
        ("alg", "'dlm_alg'"),
        ("alg_temp", "'dlm_alg_temp'"),
        ("cfg_scale", "classifier-free guidance is not supported"),
        ("mask_id", "the model's own"),
        ("guided_json", "structured_outputs"),
        ("Dlm", "'dlm'"),
        ("mode", "'dlm_mode'"),
    ],
)
def test_a_key_that_nobody_reads(key, meaning):
    said = message(refuse_unread, (key,))
    assert "would be ignored" in said and meaning in said
    if key not in EVERYDAY:
        said = message(refuse_stray, {key: 1}, "vllm_xargs", ours=True)
        assert meaning.strip("'") in said and key.strip() in said


def test_where_options_go_depends_on_the_route():
    said = message(refuse_stray, {"dlm_steps": 4}, "vllm_xargs", ours=True)
    assert '"vllm_xargs": {"dlm_steps": ...}' in said
    inner = {"threshold": 0.5}
    place = "sampling_params.extra_args"
    said = message(refuse_stray, inner, place, "sampling_params.", ours=True)
    assert said.startswith("sampling_params.threshold") and place in said


@pytest.mark.parametrize(
    "body",
    [
        {"extra_body": {"vllm_xargs": {"dlm_steps": 4}}},
        {"extra_body": {"dlm_steps": 4}},
        {"extra_args": {"dlm": {"steps": 4}}},
        {"vllm_xargs": {"dlm_steps": 4}},
        {"sampling_params": {"extra_args": {"dlm_steps": 4}}},
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_objects_that_a_route_does_not_read(body, ours):
    [carrier] = body
    said = message(refuse_stray, body, "here", ours=ours)
    assert said.startswith(f"{carrier} is not read") and '"here"' in said


def test_null_asks_for_nothing():
    refuse_stray({"steps": None, "dlm_steps": None}, "vllm_xargs", ours=True)


def test_other_models_have_only_what_begins_with_dlm():
    others = {name: 1 for name in (*FOREIGN, *own_names())}
    refuse_stray({**others, "extra_body": others}, "vllm_xargs", ours=False)
    assert "dlm-steps" in message(
        refuse_stray, {"dlm-steps": 4}, "vllm_xargs", ours=False
    )


def test_many_and_long_keys_cost_little(monkeypatch):
    from vllm_dlm.admission import stray_options

    compared = []
    monkeypatch.setattr(stray_options, "closest", lambda *a: compared.append(a))
    stray_options.meant.cache_clear()
    keys = {f"quite_another_{number}": 1 for number in range(100_000)}
    refuse_stray({"x" * 10**6: 1, "\ud800": 1, **keys}, "vllm_xargs", ours=True)
    assert len(compared) < 100
    said = message(refuse_unread, ("dlm_" + "x" * 10**6 + "\ud800",))
    assert len(said) < 300
    said.encode("utf-8")
