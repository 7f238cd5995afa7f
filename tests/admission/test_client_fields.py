# SPDX-License-Identifier: Apache-2.0
"""A refusal names the field that the client sent, whatever vLLM makes of it."""

import pytest
from admission.test_request import model_config
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_dlm.admission import sampling_params as request
from vllm_dlm.admission.client_fields import (
    CHAT,
    COMPLETION,
    GENERATE,
    MESSAGES,
    RESPONSES,
    field_of,
    options_field,
    sent_by,
)

ASKED = [{"role": "user", "content": "a"}]
SCHEMA = {"type": "object", "properties": {}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
TOOL = {"name": "look", "input_schema": SCHEMA}
REFUSED = {"structured_outputs": StructuredOutputsParams(regex="\0")}


def completion(**body):
    return COMPLETION, CompletionRequest(prompt="a", **body)


def chat(**body):
    return CHAT, ChatCompletionRequest(messages=ASKED, **body)


def responses(**body):
    return RESPONSES, ResponsesRequest(input="a", **body)


def messages(**body):
    body = {"model": "a", "messages": ASKED, "max_tokens": 8, **body}
    return MESSAGES, AnthropicMessagesRequest(**body)


@pytest.mark.parametrize(
    ("sent", "params", "field"),
    [
        (completion(response_format=FORMAT), REFUSED, "response_format"),
        (completion(structured_outputs={"regex": "a"}), REFUSED, "structured_outputs"),
        (completion(echo=True, logprobs=1), {"prompt_logprobs": 1}, "echo"),
        (completion(prompt_logprobs=1), {"prompt_logprobs": 1}, "prompt_logprobs"),
        (chat(response_format=FORMAT), REFUSED, "response_format"),
        (chat(tools=TOOLS, tool_choice="required"), REFUSED, "tool_choice"),
        (chat(tools=TOOLS), REFUSED, "tools"),
        (
            chat(tools=TOOLS, response_format={"type": "text"}, tool_choice="auto"),
            REFUSED,
            "tools",
        ),
        (
            chat(
                tools=TOOLS,
                tool_choice={"type": "function", "function": {"name": "look"}},
            ),
            REFUSED,
            "tool_choice",
        ),
        (chat(logprobs=True, top_logprobs=20), {"logprobs": 21}, "top_logprobs"),
        (
            responses(
                text={"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
            ),
            REFUSED,
            "text.format",
        ),
        (responses(top_logprobs=5), {"logprobs": 21}, "top_logprobs"),
        (messages(tools=[TOOL], tool_choice={"type": "any"}), REFUSED, "tool_choice"),
        (
            messages(
                output_config={"format": {"type": "json_schema", "schema": SCHEMA}}
            ),
            REFUSED,
            "output_config.format",
        ),
        (
            messages(
                max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024}
            ),
            {"thinking_token_budget": 1024},
            "thinking.budget_tokens",
        ),
        ((GENERATE, object()), {"seed": 2**63}, "sampling_params.seed"),
        ((GENERATE, object()), REFUSED, "sampling_params.structured_outputs"),
    ],
)
def test_the_field_is_named(sent, params, field):
    with sent_by(*sent), pytest.raises(VLLMValidationError) as caught:
        request.validate_sampling_params(SamplingParams(**params), model_config())
    assert caught.value.parameter == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (completion(max_tokens=9), "max_tokens"),
        (chat(max_tokens=9), "max_tokens"),
        (chat(max_completion_tokens=9), "max_completion_tokens"),
        (responses(max_output_tokens=9), "max_output_tokens"),
        (messages(), "max_tokens"),
    ],
)
def test_a_long_output(sent, field):
    with sent_by(*sent), pytest.raises(VLLMValidationError) as caught:
        request.refuse_long_request(16, 9, 8)
    assert caught.value.parameter == field
    assert f"{field} is 9" in str(caught.value)
    assert f"set {field} to at most 8" in str(caught.value)


@pytest.mark.parametrize(
    ("extra_args", "path"),
    [
        ({"dlm_threshold": 5}, "dlm_threshold"),
        (
            {"dlm": {"strategy_config": {"threshold": 5}}},
            "dlm.strategy_config.threshold",
        ),
        ({"dlm_strategy_config": '{"threshold": 5}'}, "dlm_strategy_config.threshold"),
        ({"dlm_steps": "many"}, "dlm_steps"),
        ({"dlm": '{"steps": "many"}'}, "dlm.steps"),
        ({"dlm_cache": "window", "dlm_cache_config": {"a": 1}}, "dlm_cache_config"),
        ({"dlm_max_canvas": 64}, "dlm_max_canvas"),
        ({"dlm_treshold": 1}, "dlm_treshold"),
        ({"threshold": 1}, "threshold"),
        ({"dlm": "{"}, "dlm"),
    ],
)
@pytest.mark.parametrize(
    ("route", "carrier"),
    [(None, "extra_args"), (CHAT, "vllm_xargs"), (GENERATE, GENERATE.options)],
)
def test_options_are_named_as_they_were_set(extra_args, path, route, carrier):
    params = SamplingParams(extra_args=extra_args)
    with pytest.raises(VLLMValidationError) as caught:
        if route is None:
            request.validate_sampling_params(params, model_config())
        else:
            with sent_by(route, object()):
                request.validate_sampling_params(params, model_config())
    assert caught.value.parameter == f"{carrier}.{path}"
    assert path in caught.value.args[0]


def test_the_first_handler_says_what_was_sent():
    """`/v1/messages` hands its request on to the handler of chats."""
    with sent_by(*messages()) as is_first:
        assert is_first
        with sent_by(*chat(max_completion_tokens=9)) as is_first:
            assert not is_first
            assert field_of("max_tokens") == "max_tokens"
            assert field_of("stop") == "stop_sequences"
    assert (field_of("stop"), options_field()) == ("stop", "extra_args")


def test_what_parsers_write_into_a_request_was_not_sent():
    route, body = chat(tools=TOOLS, tool_choice="required")
    with sent_by(route, body):
        body.structured_outputs = REFUSED["structured_outputs"]
        assert field_of("structured_outputs") == "tool_choice"
