# SPDX-License-Identifier: Apache-2.0
"""Admission: what is honoured passes, what is not is a 400, nothing is ignored."""

from operator import attrgetter
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import (
    BeamSearchParams,
    RepetitionDetectionParams,
    SamplingParams,
)

from vllm_dlm.admission import body_guard
from vllm_dlm.admission import sampling_params as request
from vllm_dlm.admission.server_options import SERVER_OPTIONS, refuse_server_options
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.patches.themes import apply_plugin_patches

MASK = 9


@pytest.fixture(autouse=True)
def patched():
    apply_plugin_patches()


def model_config(server=None, **hf_config):
    hf = SimpleNamespace(
        dlm_class="full",
        dlm_strategy="threshold",
        dlm_block_length=32,
        mask_token_id=MASK,
        eos_token_id=8,
        vocab_size=64,
        dlm_server=DlmConfig(**(server or {})).model_dump(),
    )
    vars(hf).update(hf_config)
    return SimpleNamespace(
        hf_config=hf,
        model="folder",
        is_diffusion=True,
        max_logprobs=20,
        max_model_len=256,
        get_vocab_size=lambda: 64,
    )


def verify(params, config=None):
    from vllm.config import StructuredOutputsConfig

    params.verify(config or model_config(), None, StructuredOutputsConfig(), None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 1},
        {
            "logit_bias": {3: 5.0},
            "bad_words": ["no"],
            "allowed_token_ids": [1, 2, MASK],
        },
        {"min_tokens": 4, "max_tokens": None, "ignore_eos": True},
        {"stop": ["a"], "include_stop_str_in_output": True, "stop_token_ids": [3]},
        {"n": 3, "logprobs": 20, "flat_logprobs": True},
        {"detokenize": False, "skip_special_tokens": False, "stream_interval": 4},
        {"repetition_detection": RepetitionDetectionParams(4, 1, 3)},
        {"watermarking": False, "thinking_token_budget": -1},
        {"extra_args": {"dlm": {"strategy": "static"}, "kv_transfer_params": {}}},
        {"extra_args": {"dlm_threshold": "0.5"}},
    ],
)
def test_honoured(options):
    verify(SamplingParams(**options))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt_logprob_token_ids": [[1]]}, "prompt_logprob_token_ids"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"thinking_token_budget": 3}, "thinking_token_budget"),
        ({"watermarking": True}, "watermarking"),
        ({"routed_experts_prompt_start": 2}, "routed_experts_prompt_start"),
        ({"trace_decode_token_ids": [1]}, "trace_decode_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"allowed_token_ids": [MASK]}, "mask token"),
        ({"extra_args": {"diffusion_max_steps": 3}}, "DiffusionGemma"),
        ({"extra_args": {"dlm": {"strategy": "nope"}}}, "threshold"),
        ({"extra_args": {"dlm_block_length": 512}}, "in a request: 256"),
    ],
)
def test_refused(options, fragment):
    with pytest.raises(VLLMValidationError, match=fragment):
        verify(SamplingParams(**options))


def test_logprobs_of_the_whole_vocabulary_are_refused_whatever_the_server_allows():
    config = model_config()
    config.max_logprobs = -1
    with pytest.raises(VLLMValidationError, match="logprobs=-1"):
        verify(SamplingParams(logprobs=-1), config)


def test_long_lists_of_stop_tokens_are_refused():
    """They would cost every later step of every request."""
    config = model_config()
    config.get_vocab_size = lambda: 1000
    verify(SamplingParams(stop_token_ids=list(range(128))), config)
    with pytest.raises(VLLMValidationError, match="has 129 ids; at most 128"):
        verify(SamplingParams(stop_token_ids=list(range(129))), config)


def test_the_servers_options_apply():
    config = model_config({"strategy": "factor", "max_canvas": 16})
    extra = {"dlm_block_length": 8, "dlm_factor": 2.0}
    result = request.validate_sampling_params(SamplingParams(extra_args=extra), config)
    assert (result.strategy, result.params.factor) == ("factor", 2.0)
    with pytest.raises(VLLMValidationError, match="in a request: 16"):
        verify(SamplingParams(extra_args={"dlm_block_length": 32}), config)


def test_a_strategy_may_refuse_at_admission(monkeypatch):
    from vllm_dlm.strategies.threshold import Threshold

    def validate(cls, params, block_length, context):
        raise ValueError(f"needs blocks of 8, got {block_length} ({context.cache})")

    monkeypatch.setattr(Threshold, "validate", classmethod(validate))
    with pytest.raises(VLLMValidationError, match=r"blocks of 8, got 32 \(none\)"):
        verify(SamplingParams())


def test_both_stages_of_tccf_are_checked(tmp_path):
    """The second has blocks of one, which a trained filter does not fit."""
    from vllm_dlm.strategies.learn2pd_filter import Filter

    file = tmp_path / "filter.safetensors"
    Filter.identity(16, 0.5).save(file)
    server = {"strategy": "learn2pd", "strategy_config": {"filter": str(file)}}
    config = model_config(server, dlm_class="block", dlm_block_length=16)
    verify(SamplingParams(), config)
    stages = {"dlm": {"tccf": {"trigger": [1], "check": [2]}}}
    with pytest.raises(VLLMValidationError, match="block length 16, not 1"):
        verify(SamplingParams(extra_args=stages), config)


def test_every_sampling_parameter_is_decided():
    """A parameter that a new vLLM brings must be put into one of the two tables."""
    public = {n for n in SamplingParams.__struct_fields__ if not n.startswith("_")}
    assert public == request.HONOURED | request.REFUSED.keys()
    assert not request.HONOURED & request.REFUSED.keys()


def test_an_undecided_parameter_is_refused_when_set(monkeypatch):
    monkeypatch.setattr(request, "HONOURED", request.HONOURED - {"top_k"})
    verify(SamplingParams())
    with pytest.raises(VLLMValidationError, match="top_k"):
        verify(SamplingParams(top_k=3))


def test_other_diffusion_models_keep_vllms_check():
    gemma = model_config(dlm_class=None)
    with pytest.raises(VLLMValidationError, match="not yet supported with diffusion"):
        verify(SamplingParams(temperature=0.0), gemma)
    verify(SamplingParams(extra_args={"diffusion_max_steps": 3}), gemma)


@pytest.mark.parametrize("extra", [{"dlm": {"steps": 4}}, {"dlm_steps": 4}])
def test_other_models_refuse_our_options(extra):
    gemma = model_config(dlm_class=None)
    with pytest.raises(VLLMValidationError, match="dlm.*: options of diffusion"):
        verify(SamplingParams(extra_args=extra), gemma)
    gemma.is_diffusion = False  # nor do autoregressive models
    with pytest.raises(VLLMValidationError, match="dlm.*: options of diffusion"):
        verify(SamplingParams(extra_args=extra), gemma)


def test_beam_search_is_refused_for_our_models_only():
    from vllm.config import VllmConfig

    check = VllmConfig._check_supports_watermarking
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    ours = SimpleNamespace(model_config=model_config(), watermark_config=None)
    with pytest.raises(VLLMValidationError, match="beam search"):
        check(ours, params)
    assert check(ours, SamplingParams()) is False
    other = SimpleNamespace(
        model_config=model_config(dlm_class=None), watermark_config=None
    )
    assert check(other, params) is False


def test_an_output_that_does_not_fit_is_refused_not_cut(monkeypatch):
    from vllm.entrypoints.serve.utils import api_utils

    # In a server that module is loaded before the plugins are.
    apply_plugin_patches()
    arguments = (100, 60, 50, {})
    monkeypatch.setitem(body_guard.process, "ours", False)
    assert api_utils.get_max_tokens(*arguments) == 50
    monkeypatch.setitem(body_guard.process, "ours", True)
    assert api_utils.get_max_tokens(100, 50, 50, {}) == 50
    assert api_utils.get_max_tokens(100, None, 50, {}) == 50
    with pytest.raises(VLLMValidationError, match="at most 50"):
        api_utils.get_max_tokens(*arguments)


def test_a_prompt_that_fills_the_context():
    with pytest.raises(VLLMValidationError, match="shorten the prompt") as caught:
        request.refuse_long_request(100, 16, 100)
    assert "at most" not in str(caught.value)


def server_options(**changed: object) -> SimpleNamespace:
    """A VllmConfig's options, none set but `changed` (by the end of their path)."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        parallel_config=SimpleNamespace(),
        aux_output_config=SimpleNamespace(),
        cache_config=SimpleNamespace(),
    )
    others = ("model_config.logprobs_mode", "model_config.runner_type")
    for path in (*SERVER_OPTIONS.values(), *others):
        *parents, name = path.split(".")
        owner = attrgetter(*parents)(config) if parents else config
        unset = getattr(owner, name, None)
        setattr(owner, name, changed.get(name, unset))
    return config


@pytest.mark.parametrize("flag", SERVER_OPTIONS)
def test_server_options_the_engine_would_ignore(flag):
    refuse_server_options(server_options())
    name = SERVER_OPTIONS[flag].rpartition(".")[2]
    with pytest.raises(ValueError, match=flag):
        refuse_server_options(server_options(**{name: ["x"]}))


def test_other_logprobs_than_the_raw_ones():
    config = server_options(logprobs_mode="processed_logprobs")
    with pytest.raises(ValueError, match="only raw_logprobs"):
        refuse_server_options(config)


def test_a_pooling_server():
    with pytest.raises(ValueError, match="--runner pooling and --convert"):
        refuse_server_options(server_options(runner_type="pooling"))


@pytest.mark.parametrize(
    ("hole", "options", "told", "parameter"),
    [
        (9, {"stop": ["a"]}, "no mask left", "stop"),
        (9, {"min_tokens": 1}, "no token at all", "min_tokens"),
        (9, {"logprobs": 0}, "no place of their own", "logprobs"),
        (
            9,
            {"repetition_detection": RepetitionDetectionParams(4, 1, 3)},
            "no mask left",
            "repetition_detection",
        ),
        (300, {}, "300 tokens is more than this server takes", "extra_args"),
    ],
)
def test_beside_an_elastic_hole(hole, options, told, parameter):
    """The field that is to be left out is named, as the client has sent it."""
    config = model_config(expand_token_id=5)
    config.max_model_len = 512
    canvas = {"canvas": [1] + [MASK] * hole, "holes": "elastic"}
    verify(SamplingParams(extra_args={"dlm": canvas | {"canvas": [MASK]}}), config)
    with pytest.raises(VLLMValidationError, match=told) as caught:
        verify(SamplingParams(extra_args={"dlm": canvas}, **options), config)
    assert caught.value.parameter == parameter


def test_an_elastic_hole_needs_an_end_of_text():
    """Nothing would make it narrower."""
    config = model_config(expand_token_id=5, eos_token_id=None)
    canvas = {"canvas": [1, MASK], "holes": "elastic"}
    with pytest.raises(VLLMValidationError, match="neither model nor tokenizer"):
        verify(SamplingParams(extra_args={"dlm": canvas}), config)
