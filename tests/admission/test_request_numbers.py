# SPDX-License-Identifier: Apache-2.0
"""Numbers of a request: what no tensor holds, and what is no token, is refused."""

from types import SimpleNamespace

import pytest
from admission.test_request import MASK, model_config, verify
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

from vllm_dlm.admission import sampling_params as request
from vllm_dlm.admission.client_fields import CHAT, GENERATE, sent_by
from vllm_dlm.admission.numbers import check_prompt
from vllm_dlm.messages import LONGEST_MESSAGE, OptionError
from vllm_dlm.patches.themes import apply_plugin_patches

VOCABULARY = 64
INT64 = (-(2**63), 2**63 - 1)


@pytest.fixture(autouse=True, scope="module")
def patched():
    apply_plugin_patches()


def refused(**options):
    with pytest.raises(VLLMValidationError) as caught:
        params = SamplingParams(**options)
        request.validate_sampling_params(params, model_config())
    assert len(str(caught.value)) < LONGEST_MESSAGE + 200
    return caught.value


@pytest.mark.parametrize("seed", [0, 1, *INT64])
def test_every_int64_is_a_seed(seed):
    verify(SamplingParams(seed=seed))


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -(2**63) - 1, 10**4000, "x", 1.5])
def test_other_seeds_are_refused(seed):
    error = refused(seed=seed)
    assert error.parameter == "seed" and "seed: expected an integer" in str(error)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"top_k": 2**64, "temperature": 1.0}, "top_k"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 2**70, "min_tokens": 2**65}, "max_tokens"),
        ({"max_tokens": None, "min_tokens": 2**40}, "min_tokens"),
        ({"stream_interval": 2**64}, "stream_interval"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": 2**70}, "logprobs"),
        ({"prompt_logprobs": 2**70}, "prompt_logprobs"),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
        ({"stop_token_ids": [3, -1]}, "stop_token_ids"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"allowed_token_ids": [3, VOCABULARY]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["3"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1.0]}, "allowed_token_ids"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias"),
        ({"logit_bias": {3: 1e300}}, "logit_bias"),
        ({"logit_bias": {3: "much"}}, "logit_bias"),
        (
            {"repetition_detection": RepetitionDetectionParams(2**70, 1, 2)},
            "repetition_detection",
        ),
    ],
)
def test_numbers_that_nothing_holds(options, parameter):
    error = refused(**options)
    assert error.parameter == parameter and parameter in str(error)


def test_a_million_ids_are_not_repeated():
    ids = list(range(VOCABULARY, 10**6))
    assert "64 is no token of this model" in str(refused(allowed_token_ids=ids))
    assert "64 is no token" in str(refused(logit_bias=dict.fromkeys(ids, 1.0)))


INTEGERS = st.integers() | st.integers(0, 100) | st.sampled_from([*INT64, 2**63, 2**64])
IDS = st.lists(INTEGERS, max_size=4) | st.none()
FUZZED = st.fixed_dictionaries(
    {},
    optional={
        "seed": INTEGERS,
        "top_k": INTEGERS,
        "min_tokens": INTEGERS,
        "max_tokens": INTEGERS | st.none(),
        "logprobs": INTEGERS | st.none(),
        "stream_interval": INTEGERS,
        "stop_token_ids": IDS,
        "allowed_token_ids": IDS,
        "logit_bias": st.dictionaries(INTEGERS, st.floats(), max_size=4),
        "temperature": st.floats(),
        "top_p": st.floats(),
        "min_p": st.floats(),
    },
)


@given(options=FUZZED)
def test_whatever_is_admitted_fits_the_engine(options):
    """Directly, as `/inference/v1/generate` and offline requests come."""
    try:
        params = SamplingParams(**options)
        request.validate_sampling_params(params, model_config())
    except VLLMValidationError:
        return
    assert params.top_k < 2**64
    integers = (params.seed or 0, params.stream_interval or 1)
    assert all(INT64[0] <= value <= INT64[1] for value in integers)
    room = model_config().max_model_len
    for value in (params.min_tokens, params.max_tokens or 0, params.logprobs or 0):
        assert value >= 0 and room + value < 2**31
    ids = {*params.stop_token_ids, *(params.allowed_token_ids or ())}
    assert all(0 <= token < VOCABULARY for token in ids | {*(params.logit_bias or ())})
    biases = (params.logit_bias or {}).values()
    assert all(abs(bias) < 1e10 for bias in biases)


def prompt_error(ids, route=None):
    with pytest.raises(OptionError) as caught:
        if route is None:
            check_prompt({"type": "token", "prompt_token_ids": ids}, model_config())
        else:
            with sent_by(route, SimpleNamespace()):
                check_prompt({"prompt_token_ids": ids}, model_config())
    return str(caught.value)


def test_prompts():
    for prompt in ({"prompt_token_ids": [0, 63]}, {"prompt_token_ids": []}, "text", {}):
        check_prompt(prompt, model_config())
    assert prompt_error([1, 64]).startswith("prompt: 64 is no token")
    assert "-1 is no token" in prompt_error([1, -1])
    assert prompt_error([64], CHAT).startswith("messages: ")
    assert prompt_error([64], GENERATE).startswith("token_ids: ")


def test_a_mask_in_a_prompt_is_text():
    """What it does there is said in docs/models.md, and shown in test_canvas.py."""
    check_prompt({"prompt_token_ids": [1, MASK]}, model_config())
