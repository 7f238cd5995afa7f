# SPDX-License-Identifier: Apache-2.0
"""What the wrapped functions on a request's way to the engine do: refuse, in time.

A request that cannot be honoured is a 400 before any work is done for it, and before a
streamed reply has begun. As in `front_end.py`, `WRAPPERS` and `SERVER_WRAPPERS` map
entries of the ledger (`patches.py`) to makers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm_dlm.admission import sampling_params as request
from vllm_dlm.admission.body_guard import process
from vllm_dlm.admission.client_fields import (
    CHAT,
    COMPLETION,
    GENERATE,
    MESSAGES,
    RESPONSES,
    Route,
    in_the_clients_words,
    options_field,
    sent_by,
)
from vllm_dlm.admission.numbers import check_prompt
from vllm_dlm.admission.stray_options import find_stray, is_prefixed, refuse_stray
from vllm_dlm.entrypoints import step_maps
from vllm_dlm.messages import LONGEST_MESSAGE, OptionError, bounded, name_of
from vllm_dlm.spec_decode import front_end as speculation
from vllm_dlm.spec_decode import options as spec

Maker = Callable[[Callable[..., Any]], Callable[..., Any]]


def _handle(route: Route) -> Maker:
    """A route's handler: what the client sent is known here, under its own names."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def handle(self: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm.exceptions import VLLMValidationError

            given = dict(zip(("request", "raw_request"), args, strict=False)) | kwargs
            body, raw_request = given["request"], given.get("raw_request")
            with sent_by(route, body) as is_first:
                if not is_first:
                    return await original(self, *args, **kwargs)
                ours = request.is_ours(self.model_config.hf_config)
                try:
                    await _refuse_unread(route, body, raw_request, ours)
                    return await original(self, *args, **kwargs)
                except OptionError as error:
                    raise request.refusal(error) from None
                except VLLMValidationError as error:
                    raise _as_sent(error, ours) from None

        return handle

    return make


async def _refuse_unread(route: Route, body: Any, raw_request: Any, ours: bool) -> None:
    """Fields that are meant for us, and that vLLM would drop without a word.

    Raises:
        OptionError: it names the first.
    """
    unread = body.model_extra
    parsed = raw_request is not None and unread is None
    # FastAPI has parsed it, and keeps it.
    sent = await raw_request.json() if parsed else {}
    if unread is None:
        unread = _without(sent, type(body).model_fields)
    # A batch of chats has it from chats: it is no field of its own class.
    refuse_stray(_without(unread, (route.options,)), route.options, ours=ours)
    if route is GENERATE:
        inner = sent.get("sampling_params")
        if isinstance(inner, Mapping):
            known = type(body.sampling_params).__struct_fields__
            refuse_stray(_without(inner, known), route.options, route.prefix, ours=ours)
    template = getattr(body, "chat_template_kwargs", None)
    if template and (found := find_stray(template, ours=False)):
        raise OptionError(
            f"chat_template_kwargs: {name_of(found[0])} is for the template there; put "
            f'options into "{route.options}"',
            "chat_template_kwargs",
        )
    if ours and getattr(body, "suffix", None) is not None:
        raise OptionError(
            "suffix: filling in between two texts is not supported for diffusion "
            "language models yet. Remove it from the request.",
            "suffix",
        )


def _without(sent: Mapping[str, Any], known: Any) -> dict[str, Any]:
    return {name: value for name, value in sent.items() if name not in known}


def _as_sent(error: Any, ours: bool) -> Any:
    """A refusal of vLLM's in the client's words, and of a length that can be sent.

    vLLM repeats what was sent, twice, whatever its length.
    """
    from vllm.exceptions import VLLMValidationError

    text = str(error.args[0]) if error.args else ""
    parameter, message = error.parameter, bounded(text)
    if ours:
        message = in_the_clients_words(message)
        parameter = parameter and in_the_clients_words(parameter)
    is_short = len(str(error)) <= LONGEST_MESSAGE
    if is_short and (message, parameter) == (text, error.parameter):
        return error
    return VLLMValidationError(message, parameter=parameter)


def _get_max_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_max_tokens(
        max_model_len: int,
        max_tokens: int | None,
        input_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if process["ours"]:
            request.refuse_long_request(max_model_len, max_tokens, input_length)
        return original(max_model_len, max_tokens, input_length, *args, **kwargs)

    return get_max_tokens


def _validate_diffusion(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(self: Any, model_config: Any) -> None:
        if request.is_ours(model_config.hf_config):
            request.validate_sampling_params(self, model_config)
            return
        _refuse_dlm_options(self.extra_args or {})
        original(self, model_config)

    return validate


def _refuse_dlm_options(extra_args: Mapping[str, Any]) -> None:
    """Autoregressive models and vLLM's own diffusion models would not read our options.

    Raises:
        VLLMValidationError: a request sets some of them (HTTP 400).
    """
    ours = [key for key in extra_args if is_prefixed(key) and key != spec.REQUEST_KEY]
    if ours:
        names = ", ".join(map(name_of, ours[:5]))
        raise request.refusal(
            OptionError(
                f"{names}: options of diffusion language models; vLLM itself serves "
                "this one and would ignore them. Remove them (only "
                f"{spec.REQUEST_KEY} is for other models, with --speculative-config).",
                f"{options_field()}.{name_of(ours[0])}",
            )
        )


def _validate_token_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(
        self: Any, token_ids: Any, *args: Any, parameter: str | None = None
    ) -> None:
        original(self, token_ids, *args, parameter=parameter)
        if request.is_ours(self.model_config.hf_config):
            try:
                check_prompt({"prompt_token_ids": token_ids}, self.model_config)
            except OptionError as error:
                raise request.refusal(error) from None

    return validate


def _validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(self: Any, speculative_config: Any) -> None:
        speculation.check_request(self, speculative_config)
        original(self, speculative_config)

    return validate


def _check_supports_watermarking(original: Callable[..., Any]) -> Callable[..., Any]:
    def check(self: Any, config: Any = None, **kwargs: Any) -> bool:
        from vllm.sampling_params import BeamSearchParams

        # The one place where both ways of beam search show their parameters.
        if isinstance(config, BeamSearchParams):
            request.refuse_beam_search(self.model_config)
        return original(self, config, **kwargs)

    return check


def _generate(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        _check(prompt, sampling_params, self.vllm_config)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _generate_response(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate(
        self: Any,
        *args: Any,
        engine_input: Any,
        sampling_params: Any,
        **kwargs: Any,
    ) -> Any:
        _check(engine_input, sampling_params, self.engine_client.vllm_config)
        return original(
            self,
            *args,
            engine_input=engine_input,
            sampling_params=sampling_params,
            **kwargs,
        )

    return generate


def _check(prompt: Any, sampling_params: Any, vllm_config: Any) -> None:
    """Refuse now, and not in the first step of an answer, what may not be asked.

    Raises:
        VLLMValidationError: the request cannot be honoured (HTTP 400).
    """
    model_config = vllm_config.model_config
    if not request.is_ours(model_config.hf_config):
        _refuse_dlm_options(sampling_params.extra_args or {})
        speculation.check_request(sampling_params, vllm_config.speculative_config)
        return
    config = request.validate_sampling_params(sampling_params, model_config)
    step_maps.refuse_streaming(config, sampling_params)
    try:
        check_prompt(prompt, model_config)
    except OptionError as error:
        raise request.refusal(error) from None


_OPENAI = "vllm.entrypoints.openai"
_RENDER = "vllm.entrypoints.scale_out.render.serving:ServingRender"
HANDLERS: dict[str, Route] = {
    f"{_OPENAI}.completion.serving:OpenAIServingCompletion.create_completion": (
        COMPLETION
    ),
    f"{_OPENAI}.chat_completion.serving:OpenAIServingChat.create_chat_completion": CHAT,
    f"{_OPENAI}.chat_completion.batch_serving:OpenAIServingChatBatch"
    ".create_batch_chat_completion": CHAT,
    f"{_OPENAI}.responses.serving:OpenAIServingResponses.create_responses": RESPONSES,
    "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.create_messages": (
        MESSAGES
    ),
    "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens"
    ".serve_tokens": GENERATE,
    f"{_RENDER}.render_completion_request": COMPLETION,
    f"{_RENDER}.render_chat_request": CHAT,
    f"{_RENDER}.render_responses_request": RESPONSES,
    f"{_RENDER}.render_messages_request": MESSAGES,
}
"""Method of the HTTP server -> the route whose requests it handles."""

SERVER_WRAPPERS: dict[str, Maker] = {
    "vllm.entrypoints.serve.utils.api_utils:get_max_tokens": _get_max_tokens,
    "vllm.v1.engine.async_llm:AsyncLLM.generate": _generate,
    f"{_OPENAI}.responses.serving:OpenAIServingResponses"
    "._generate_with_builtin_tools": _generate_response,
    **{symbol: _handle(route) for symbol, route in HANDLERS.items()},
}
"""Only where the HTTP server's module is loaded: importing it costs seconds."""

WRAPPERS: dict[str, Maker] = {
    "vllm.renderers.base:BaseRenderer.validate_token_ids": _validate_token_ids,
    "vllm.sampling_params:SamplingParams._validate_diffusion": _validate_diffusion,
    "vllm.sampling_params:SamplingParams._validate_spec_decode": _validate_spec_decode,
    "vllm.config.vllm:VllmConfig._check_supports_watermarking": (
        _check_supports_watermarking
    ),
}
"""As soon as the plugin is loaded."""
