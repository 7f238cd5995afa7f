# SPDX-License-Identifier: Apache-2.0
"""Wrapped handlers: refusals come when they are called, under the client's names."""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from admission.test_client_fields import ASKED, chat, completion, messages, responses
from admission.test_request import model_config
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams

from vllm_dlm.admission.client_fields import CHAT, GENERATE, MESSAGES
from vllm_dlm.config.engine_keys import SPECULATION
from vllm_dlm.messages import LONGEST_MESSAGE
from vllm_dlm.patches import admission, handlers
from vllm_dlm.patches.ledger import PATCHES, find
from vllm_dlm.patches.unread_fields import handle

STREAMED = {"output_kind": RequestOutputKind.DELTA}


def autoregressive():
    config = model_config(dlm_class=None)
    config.is_diffusion = False
    return config


class RawRequest:
    """What a handler can ask of Starlette's request."""

    def __init__(self, body):
        self._body = body

    async def json(self):
        return self._body


def answer(route, body, sent=None, config=None, original=None):
    """What a wrapped handler gives; the original one answers "done"."""

    async def plain(self, request, raw_request=None):
        return "done"

    handler = handle(route)(original or plain)
    engine = SimpleNamespace(model_config=config or model_config())
    raw_request = None if sent is None else RawRequest(sent)
    return asyncio.run(handler(engine, body, raw_request))


def refused(*args, **kwargs):
    with pytest.raises(VLLMValidationError) as caught:
        answer(*args, **kwargs)
    return caught.value


def sent_messages(**extra):
    body = {"model": "a", "messages": ASKED, "max_tokens": 8, **extra}
    known = {name: body[name] for name in ("vllm_xargs",) if name in body}
    return *messages(**known), body


def generate(params=None, **extra):
    body = {"token_ids": [1], "sampling_params": params or {}, **extra}
    return GENERATE, GenerateRequest(**body), body


def batch(**extra):
    return CHAT, BatchChatCompletionRequest(messages=[ASKED], **extra)


@pytest.mark.parametrize("make", [completion, chat, responses, batch, sent_messages])
def test_fields_of_a_body_that_nobody_reads(make):
    assert answer(*make(foo=1, mode="fast", vllm_xargs={"dlm_steps": 4})) == "done"
    error = refused(*make(gen_length=64))
    assert error.parameter == "gen_length" and "'max_tokens'" in str(error)
    error = refused(*make(dlm_steps=4))
    assert error.parameter == "dlm_steps" and '"vllm_xargs"' in str(error)
    error = refused(*make(extra_body={"dlm_steps": 4}))
    assert error.parameter == "extra_body"
    other = autoregressive()
    assert answer(*make(gen_length=64, steps=4), config=other) == "done"
    assert refused(*make(dlm_steps=4), config=other).parameter == "dlm_steps"


def test_a_body_of_token_ids():
    assert answer(*generate({"seed": 1, "extra_args": {"dlm_steps": 4}})) == "done"
    for params in ({"threshold": 0.5}, {"vllm_xargs": {"dlm_steps": 4}}):
        error = refused(*generate(params))
        assert error.parameter == f"sampling_params.{next(iter(params))}"
        assert "sampling_params.extra_args" in str(error)
    assert refused(*generate(dlm_steps=4)).parameter == "dlm_steps"
    error = refused(*generate(vllm_xargs={"dlm_steps": 4}))
    assert error.parameter == "vllm_xargs"


def test_options_for_a_template():
    kwargs = {"enable_thinking": False, "steps": 3}
    assert answer(*chat(chat_template_kwargs=kwargs)) == "done"
    error = refused(*chat(chat_template_kwargs={"dlm_steps": 4}))
    assert error.parameter == "chat_template_kwargs" and "dlm_steps" in str(error)


def test_suffix_becomes_an_option_of_our_models():
    seen = []

    async def note(self, request, raw_request=None):
        seen.append((request.suffix, request.vllm_xargs))
        return "done"

    asked = completion(suffix="end")
    assert answer(*asked, original=note) == "done"
    assert seen.pop() == (None, {"dlm_suffix": "end"})
    assert asked[1].suffix == "end"
    theirs = answer(*completion(suffix="end"), original=note, config=autoregressive())
    assert theirs == "done" and seen.pop() == ("end", None)
    error = refused(*completion(suffix="end", echo=True))
    assert error.parameter == "echo"


def test_a_null_that_vllm_cannot_repeat_is_the_default():
    seen = []

    async def note(self, request, raw_request=None):
        seen.append((request.background, request.truncation))
        return "done"

    nulls = {"background": None, "truncation": None}
    assert answer(*responses(**nulls), original=note) == "done"
    own = {"background": True, "truncation": "auto"}
    assert answer(*responses(**own), original=note) == "done"
    theirs = answer(*responses(**nulls), original=note, config=autoregressive())
    assert theirs == "done"
    assert seen == [(False, "disabled"), (True, "auto"), (None, None)]


def test_what_vllm_repeats_is_cut_short():
    async def repeats(self, request, raw_request=None):
        ids = list(range(10**5)) + ["\ud800"]
        raise VLLMValidationError(f"bad ids: {ids}", parameter="stop", value=ids)

    error = refused(*completion(), original=repeats)
    assert error.parameter == "stop" and len(str(error)) < LONGEST_MESSAGE + 100
    str(error).encode("utf-8")


@pytest.mark.parametrize(
    ("made", "params", "said", "parameter"),
    [
        (
            chat(max_completion_tokens=8),
            {"min_tokens": 9, "max_tokens": 8},
            "equal to max_completion_tokens=8",
            None,
        ),
        (
            responses(),
            {"max_tokens": 0},
            "max_output_tokens must be",
            "max_output_tokens",
        ),
        (messages(), {"stop": [""]}, "stop_sequences cannot contain", None),
        (
            chat(top_logprobs=0, logprobs=True),
            {"logprobs": -2},
            "top_logprobs must",
            "top_logprobs",
        ),
    ],
)
def test_what_vllm_refuses_is_named_as_it_was_sent(made, params, said, parameter):
    async def samples(self, request, raw_request=None):
        SamplingParams(**params)

    error = refused(*made, original=samples)
    assert said in str(error) and error.parameter == parameter
    with pytest.raises(VLLMValidationError) as unchanged:
        SamplingParams(**params)
    error = refused(*made, original=samples, config=autoregressive())
    assert str(error) == str(unchanged.value)


def test_a_handler_that_hands_on():
    """Fields that vLLM itself puts into the second body are not the client's."""

    async def hands_on(self, request, raw_request=None):
        inner = handle(CHAT)(_refuses)
        _, body = chat(max_completion_tokens=9, dlm_steps=4)
        return await inner(self, body, raw_request)

    async def _refuses(self, request, raw_request=None):
        admission.request.refuse_long_request(16, 9, 8)

    error = refused(*sent_messages(), original=hands_on)
    assert error.parameter == "max_tokens"


def ask(params, config, prompt=None, speculative=None, additional=()):
    """Call the wrapped `AsyncLLM.generate`; nothing is read from what it gives."""
    generate = admission.generate(lambda self, prompt, params: "begun")
    vllm_config = SimpleNamespace(
        model_config=config,
        speculative_config=speculative,
        additional_config=dict(additional),
    )
    prompt = {"prompt_token_ids": prompt or [1]}
    return generate(SimpleNamespace(vllm_config=vllm_config), prompt, params)


def test_a_stream_is_refused_when_it_is_asked_for():
    assert ask(SamplingParams(**STREAMED), model_config()) == "begun"
    for options in ({"extra_args": {"dlm_steps": "x"}}, {"seed": 2**63}):
        with pytest.raises(VLLMValidationError):
            ask(SamplingParams(**STREAMED, **options), model_config())
    with pytest.raises(VLLMValidationError, match="64 is no token"):
        ask(SamplingParams(**STREAMED), model_config(), [64])


@pytest.mark.parametrize("key", ["dlm", "dlm_steps", "dlm-steps", "DLM_threshold"])
def test_our_options_of_other_models_are_refused_before_a_stream(key):
    params = SamplingParams(**STREAMED, extra_args={key: 4})
    with pytest.raises(VLLMValidationError, match=f"{key}: options of diffusion"):
        ask(params, autoregressive())
    assert ask(SamplingParams(**STREAMED), autoregressive()) == "begun"


def test_a_drafts_limit_is_refused_before_a_stream():
    params = SamplingParams(**STREAMED, extra_args={"dlm_draft_tokens": 4})
    with pytest.raises(VLLMValidationError, match="no speculative decoding"):
        ask(params, autoregressive())
    speculative = SimpleNamespace(num_speculative_tokens=3, method="ngram")
    with pytest.raises(VLLMValidationError, match="'ngram', is vLLM's own .* aded"):
        ask(params, autoregressive(), speculative=speculative)
    ours = {SPECULATION: {"method": "aded"}}
    with pytest.raises(VLLMValidationError, match="to 3, got 4"):
        ask(params, autoregressive(), speculative=speculative, additional=ours)
    params.extra_args["dlm_draft_tokens"] = 3
    begun = ask(params, autoregressive(), speculative=speculative, additional=ours)
    assert begun == "begun"


def test_every_handler_is_in_the_ledger():
    entry = PATCHES["vllm.entrypoints.serve.engine.serving:BaseServing.__init__"]
    assert set(handlers.HANDLERS) < set(entry.overrides) == set(handlers.METHODS)
    assert MESSAGES in handlers.HANDLERS.values()


@pytest.mark.parametrize("symbol", handlers.METHODS)
def test_a_handlers_subclass_has_our_method(symbol):
    kind, name, original = find(symbol)
    ours = handlers.subclass(kind)
    assert issubclass(ours, kind) and ours.__name__ == kind.__name__
    assert vars(ours)[name].__wrapped__ is original
    # vLLM's own class, and those that are not handlers of ours, stay as they are.
    assert vars(kind)[name] is original
    assert handlers.subclass(ours) is ours
    assert handlers.subclass(BaseServing) is BaseServing


def test_what_a_handler_inherits_is_ours_too_and_what_it_replaces_is_its_own():
    class Handler(OpenAIServingChat):
        async def chat_completion_full_generator(self, *args, **kwargs):
            """Another answer."""

    ours = vars(handlers.subclass(Handler))
    assert "create_chat_completion" in ours and "_raise_if_error" in ours
    assert "chat_completion_full_generator" not in ours


def test_a_handler_is_made_with_our_subclass(monkeypatch):
    made = []

    class Handler(OpenAIServingChat):
        def __init__(self):
            BaseServing.__init__(self, None, None)

    original = inspect.unwrap(BaseServing.__init__)

    def init(self, *args):
        made.append(type(self))
        original(self, *args)

    monkeypatch.setattr(BaseServing, "__init__", handlers.base_serving_init(init))
    handler = Handler()
    assert made == [type(handler)] == [handlers.subclass(Handler)]
    assert type(handler) is not Handler and isinstance(handler, Handler)


def test_a_method_that_this_vllm_lacks_is_named(monkeypatch):
    monkeypatch.delattr(OpenAIServingChat, "create_chat_completion")

    class Handler(OpenAIServingChat):
        pass

    with pytest.raises(RuntimeError, match=r"Chat\.create_chat_completion, which vLLM"):
        handlers.subclass(Handler)
