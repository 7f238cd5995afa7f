# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for at most, and ids: nothing it says indexes past a table."""

from __future__ import annotations

import math
from typing import Any

import pytest
from admission.test_request import MASK, model_config, verify
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_dlm.admission.bounds import MOST_STOP_STRINGS
from vllm_dlm.patches.themes import apply_plugin_patches

SIZE = 64
"""Tokens of `model_config()`'s model."""

ids = st.one_of(
    st.integers(0, SIZE - 1),
    st.sampled_from([-1, -SIZE, SIZE, SIZE + 1, 2**31, 2**63, 2**70, -(2**70)]),
)


@pytest.fixture(autouse=True)
def patched():
    apply_plugin_patches()


@given(
    field=st.sampled_from(["stop_token_ids", "allowed_token_ids", "logit_bias"]),
    chosen=st.lists(ids, min_size=1, max_size=4),
)
def test_ids_are_tokens_of_the_model(field: str, chosen: list[int]):
    value: Any = dict.fromkeys(chosen, 1.0) if field == "logit_bias" else chosen
    sampling = SamplingParams(**{field: value})
    is_mask_alone = field == "allowed_token_ids" and set(chosen) == {MASK}
    if all(0 <= token < SIZE for token in chosen) and not is_mask_alone:
        verify(sampling)
        return
    with pytest.raises(VLLMValidationError):
        verify(sampling)


@given(name=st.sampled_from(["trigger", "check"]), chosen=st.lists(ids, min_size=1))
def test_texts_of_tccf_are_tokens_of_the_model(name: str, chosen: list[int]):
    texts = {"trigger": [1], "check": [2], name: chosen}
    options = {"extra_args": {"dlm": {"tccf": texts}}}
    config = model_config(dlm_class="block", dlm_block_origin="start")
    if all(0 <= token < SIZE for token in chosen):
        verify(SamplingParams(**options), config)
        return
    with pytest.raises(VLLMValidationError, match=f"{name}|integers"):
        verify(SamplingParams(**options), config)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"max_tokens": 2**30, "min_tokens": 2**30, "top_k": 2**62}, None),
        (
            {"max_tokens": 2**30 + 1},
            "max_tokens: expected an integer from 1 to 1073741824",
        ),
        (
            {"max_tokens": 2**70, "min_tokens": 2**70},
            "max_tokens: expected an integer from 1",
        ),
        ({"stop_token_ids": list(range(64)) + [0]}, None),
        ({"stop": ["a"] * MOST_STOP_STRINGS}, None),
        ({"stop": [f"{i}" for i in range(MOST_STOP_STRINGS + 1)]}, "129 strings"),
        ({"stop": "a" * 1024}, None),
        ({"stop": "a" * 1025}, "stop has 1025 characters in a string; at most 1024"),
        ({"bad_words": [str(i) for i in range(128)]}, None),
        (
            {"bad_words": [str(i) for i in range(129)]},
            "bad_words has 129 words; at most 128",
        ),
        ({"bad_words": ["a" * 257]}, "bad_words has 257 characters in a word"),
        (
            {"bad_words": [str(i) * 256 for i in range(9)]},
            "bad_words has 2304 characters; at most 2048",
        ),
        ({"allowed_token_ids": list(range(64))}, None),
        ({"allowed_token_ids": [1] * 65}, "has 65 ids; at most 64"),
        (
            {"logit_bias": {3: math.inf}},
            "logit_bias: expected finite numbers .* got inf for token 3",
        ),
        (
            {"logit_bias": {3: math.nan}},
            "logit_bias: expected finite numbers .* got nan for token 3",
        ),
        ({"allowed_token_ids": [MASK, MASK]}, "only the mask token"),
        ({"allowed_token_ids": [8], "min_tokens": 1}, "forbids to end it"),
        ({"allowed_token_ids": [8], "min_tokens": 0}, None),
        (
            {"allowed_token_ids": [7, MASK], "stop_token_ids": [7], "min_tokens": 1},
            "forbids to end it",
        ),
        ({"allowed_token_ids": [7, 8], "min_tokens": 1}, None),
    ],
)
def test_numbers_that_multiply_work_are_bounded(options, fragment):
    if fragment is None:
        verify(SamplingParams(**options))
        return
    with pytest.raises(VLLMValidationError, match=fragment):
        verify(SamplingParams(**options))


@pytest.mark.parametrize(
    ("texts", "fragment"),
    [
        ({"trigger": [1] * 64, "check": [1] * 1024}, None),
        ({"trigger": [1] * 65, "check": [1]}, "trigger has 65 tokens; at most 64"),
        ({"trigger": [1], "check": [1] * 1025}, "check has 1025 tokens; at most 1024"),
        ({"trigger": "a" * 4097, "check": [1]}, "trigger"),
    ],
)
def test_texts_of_tccf_are_bounded(texts, fragment):
    config = model_config(dlm_class="block", dlm_block_origin="start")
    sampling = SamplingParams(extra_args={"dlm": {"tccf": texts}})
    if fragment is None:
        verify(sampling, config)
        return
    with pytest.raises(VLLMValidationError, match=fragment):
        verify(sampling, config)


def test_a_map_is_bounded_by_what_the_request_may_write():
    """A map of 393 kB made one token cost half a million forwards."""
    steps = [500_000] + [0] * 131_000
    options = {"strategy": "replay", "strategy_config": {"recorded_steps": steps}}
    asks = {"extra_args": {"dlm": options}}
    with pytest.raises(VLLMValidationError, match="at most 257 is accepted"):
        verify(SamplingParams(max_tokens=1, **asks))
    # Nor by a long text: the context is 256.
    with pytest.raises(VLLMValidationError, match=f"at most {9 * 129 - 1} is"):
        verify(SamplingParams(max_tokens=10**9, **asks))
    steps[0] = 257
    verify(SamplingParams(max_tokens=1, **asks))


def test_half_a_character_is_no_word():
    """No tokenizer can cut it: what it raises would be a 500."""
    verify(SamplingParams(bad_words=["a", "\U0001f600"]))
    with pytest.raises(VLLMValidationError, match=r"bad_words: entry 1 holds half a"):
        verify(SamplingParams(bad_words=["a", "\ud83d"]))
