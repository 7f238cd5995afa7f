# SPDX-License-Identifier: Apache-2.0
"""A request's way to the engine: what cannot be honoured is refused, in time.

That is a 400 before any work is done for the request, and before a streamed reply has
begun. What vLLM would not read at all is refused before (`unread_fields.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_dlm.admission import sampling_params as request
from vllm_dlm.admission.body_guard import process
from vllm_dlm.admission.canvases import check_with_prompt
from vllm_dlm.admission.client_fields import options_field
from vllm_dlm.admission.handover import (
    NotedOptions,
    noted,
    private_copy,
    send_off,
    take_notes,
)
from vllm_dlm.admission.numbers import check_prompt
from vllm_dlm.admission.stray_options import is_prefixed
from vllm_dlm.admission.thoughts import note_thought
from vllm_dlm.admission.waiting import add_the_servers
from vllm_dlm.entrypoints import frames, step_maps
from vllm_dlm.entrypoints.wings import check_request, wings
from vllm_dlm.messages import OptionError, name_of
from vllm_dlm.model_executor.cpu_runner_limits import refuse_thinking_budget
from vllm_dlm.patches.ledger import Where, patch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from vllm import PoolingParams, PromptType, SamplingParams
    from vllm.config import ModelConfig, VllmConfig
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.inputs import EngineInput
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_dlm.config.request import RequestConfig


@patch(
    "vllm.entrypoints.serve.utils.api_utils:get_max_tokens",
    why="The HTTP server cuts max_tokens to what fits and does not say so.",
    upstream="docs/upstream.md#max_tokens-is-cut-without-a-word",
    drop_when="vLLM can refuse instead of clamping",
    where=Where.SERVER,
)
def get_max_tokens(original: Callable[..., int]) -> Callable[..., int]:
    """Refuses an explicit max_tokens that does not fit, for our models."""

    def clamp(
        max_model_len: int,
        max_tokens: int | None,
        input_length: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if process["ours"]:
            request.refuse_long_request(max_model_len, max_tokens, input_length)
        return original(max_model_len, max_tokens, input_length, *args, **kwargs)

    return clamp


@patch(
    "vllm.sampling_params:SamplingParams._validate_diffusion",
    why="It refuses temperature, seed and others for every diffusion model.",
    upstream="docs/upstream.md#the-diffusion-check-does-not-ask-the-model",
    drop_when="a model can say which sampling parameters it honours",
)
def validate_diffusion(original: Callable[..., None]) -> Callable[..., None]:
    """Our models get `validate_sampling_params`; others keep it and refuse our options,
    which vLLM would ignore."""

    def validate(self: SamplingParams, model_config: ModelConfig) -> None:
        if request.is_ours(model_config.hf_config):
            request.validate_sampling_params(self, model_config)
            return
        _refuse_dlm_options(self.extra_args or {})
        original(self, model_config)

    return validate


def _refuse_dlm_options(extra_args: Mapping[str, Any]) -> None:
    """Refuse our options for models that would not read them, vLLM's own.

    Raises:
        VLLMValidationError: a request sets some of them (HTTP 400).
    """
    theirs = {key: flag for wing in wings() for key, flag in wing.REQUEST_KEYS.items()}
    ours = [key for key in extra_args if is_prefixed(key) and key not in theirs]
    if ours:
        names = ", ".join(map(name_of, ours[:5]))
        others = "; ".join(
            f"{key} is for other models, with {flag}" for key, flag in theirs.items()
        )
        raise request.refusal(
            OptionError(
                f"{names}: options of diffusion language models; vLLM itself serves "
                f"this one and would ignore them. Remove them (only {others}).",
                f"{options_field()}.{name_of(ours[0])}",
            )
        )


@patch(
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    why=(
        "Prompts may have any id that the tokenizer knows, and without one any at all; "
        "the model may have no embedding for it, which ends the engine. And what the "
        "check of a request's options has read of them has no way to the engine, which "
        "would read them twice more. A request's own draft limit would be read by the "
        "worker only."
    ),
    upstream="docs/upstream.md#a-plugin-cannot-complete-the-engines-request",
    drop_when=(
        "vLLM checks prompts of text against the model's vocabulary, and a plugin can "
        "add to the request that goes to the engine"
    ),
    where=Where.ADMISSION,
)
def process_inputs(
    original: Callable[..., EngineCoreRequest],
) -> Callable[..., EngineCoreRequest]:
    """For our models, refuses such ids, and sends what the options say along as plain
    data in their place; the caller's parameters stay as they are. For others, asks the
    wings."""

    def process(
        self: InputProcessor,
        request_id: str,
        prompt: PromptType | EngineInput,
        params: SamplingParams | PoolingParams,
        *args: Any,
        **kwargs: Any,
    ) -> EngineCoreRequest:
        from vllm.sampling_params import SamplingParams

        ours = request.is_ours(self.model_config.hf_config)
        if isinstance(params, SamplingParams):
            if not ours:
                check_request(params, self.vllm_config)
            else:
                params = private_copy(params)
                add_the_servers(params, self.vllm_config)
                if noted(params) is None:
                    # Else it was checked before its answer began (`generate`), where
                    # the options of its own reasoning parser are known, too.
                    with _refusing():
                        note_thought(params, prompt, self.vllm_config)
        made = original(self, request_id, prompt, params, *args, **kwargs)
        if ours and made.sampling_params is not None:
            config = noted(made.sampling_params)
            _check_prompt(made.prompt_token_ids, config, self.model_config)
            _have_watched(made.sampling_params)
            send_off(made.sampling_params)
        return made

    return process


@patch(
    "vllm.config.vllm:VllmConfig._check_supports_watermarking",
    why="Beam search reaches the engine as one-token requests.",
    upstream="docs/upstream.md#beam-search-does-not-ask-the-model",
    drop_when="vLLM refuses beam search for diffusion models",
)
def check_supports_watermarking(original: Callable[..., bool]) -> Callable[..., bool]:
    """Called first by both ways of beam search; refuses it for our models."""

    def check(self: VllmConfig, config: Any = None, **kwargs: Any) -> bool:
        from vllm.sampling_params import BeamSearchParams

        # The one place where both ways of beam search show their parameters.
        if isinstance(config, BeamSearchParams):
            request.refuse_beam_search(self.model_config)
        return original(self, config, **kwargs)

    return check


@patch(
    "vllm.v1.engine.async_llm:AsyncLLM.generate",
    why=(
        "It checks a request when its first token is asked for: a streamed reply has "
        "begun by then, with status 200."
    ),
    upstream="docs/upstream.md#requests-are-verified-after-a-stream-has-begun",
    drop_when="vLLM verifies sampling parameters before it streams",
    where=Where.SERVER,
)
def generate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Checks requests for our models, and our options of others, when it is called."""

    def begin(
        self: AsyncLLM,
        prompt: PromptType | EngineInput | AsyncGenerator[Any, None],
        sampling_params: SamplingParams,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if request.is_ours(self.vllm_config.model_config.hf_config):
            sampling_params = private_copy(sampling_params)
            add_the_servers(sampling_params, self.vllm_config)
        own = kwargs.get("reasoning_parser_kwargs")
        _check(prompt, sampling_params, self.vllm_config, own)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return begin


def checked_before_the_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for /v1/responses, which asks the engine when its stream has begun."""

    def begin(
        self: OpenAIServingResponses,
        *args: Any,
        engine_input: EngineInput,
        sampling_params: SamplingParams,
        **kwargs: Any,
    ) -> Any:
        vllm_config = self.engine_client.vllm_config
        if request.is_ours(vllm_config.model_config.hf_config):
            # Made for this request alone.
            take_notes(sampling_params)
            add_the_servers(sampling_params, vllm_config)
        _check(engine_input, sampling_params, vllm_config)
        return original(
            self,
            *args,
            engine_input=engine_input,
            sampling_params=sampling_params,
            **kwargs,
        )

    return begin


def _check(
    prompt: Any,
    sampling_params: SamplingParams,
    vllm_config: VllmConfig,
    parser_options: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a request that cannot be honoured, before its answer begins.

    Raises:
        VLLMValidationError: HTTP 400.
    """
    model_config = vllm_config.model_config
    if not request.is_ours(model_config.hf_config):
        _refuse_dlm_options(sampling_params.extra_args or {})
        refuse_thinking_budget(sampling_params, vllm_config)
        check_request(sampling_params, vllm_config)
        return
    with _refusing():
        note_thought(sampling_params, prompt, vllm_config, parser_options)
    config = request.validate_sampling_params(sampling_params, model_config)
    step_maps.refuse_without_place(config, sampling_params)
    _have_watched(sampling_params)
    if isinstance(prompt, dict):
        _check_prompt(prompt.get("prompt_token_ids"), config, model_config)


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with an option is an HTTP 400."""
    try:
        yield
    except OptionError as error:
        raise request.refusal(error) from None


def _check_prompt(
    ids: Sequence[int] | None, config: RequestConfig | None, model_config: ModelConfig
) -> None:
    """Refuse a prompt with ids that the model has no embedding for, and a canvas of the
    request's own that does not fit behind it.

    Raises:
        VLLMValidationError: it says which id, or names the lengths (HTTP 400).
    """
    with _refusing():
        check_prompt({"prompt_token_ids": ids}, model_config)
        if config is not None and config.canvas is not None and ids is not None:
            check_with_prompt(config.canvas, len(ids), model_config.max_model_len)


def _have_watched(sampling_params: SamplingParams) -> None:
    """Have a request watched whose options, or whose watcher, ask for it.

    Raises:
        VLLMValidationError: there is nobody to be shown its frames (HTTP 400).
    """
    asked = sampling_params.extra_args
    if isinstance(asked, NotedOptions) and asked.config and asked.watched is None:
        with _refusing():
            asked.watched = frames.watch(asked.config, sampling_params)
