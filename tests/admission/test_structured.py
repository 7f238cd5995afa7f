# SPDX-License-Identifier: Apache-2.0
"""Constraints of requests: read, compiled where nobody waits, kept, and checked."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from byte_model import EOS, MASK, write_byte_model
from pydantic import BaseModel
from transformers import AutoTokenizer
from vllm.config.structured_outputs import StructuredOutputsConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from vllm_dlm.admission import structured, waiting
from vllm_dlm.admission.client_fields import CHAT
from vllm_dlm.constraints.cache import Cache, Compiled, Job, Source
from vllm_dlm.constraints.limits import ConstraintError
from vllm_dlm.constraints.vocabulary import Vocabulary
from vllm_dlm.patches.unread_fields import handle

BYTES = Vocabulary.of_tokens({byte: bytes([byte]) for byte in range(256)}, 257)


def job(text: str, kind: str = "regex", **options: Any) -> Job:
    return Job(Source(kind, text, **options), lambda: BYTES, "bytes", (256,))


def source(**asked: Any) -> Source:
    return structured.source_of(StructuredOutputsParams(**asked))


def test_what_is_asked_for_becomes_a_pattern() -> None:
    assert source(regex="a+").pattern() == "a+"
    assert source(grammar='root ::= "a" root | "b"').pattern() == "a*b"
    assert source(choice=["a.b", "c"]).pattern() == "a\\.b|c"
    schema = {"const": [1, 2]}
    for json_ in (schema, json.dumps(schema)):
        assert source(json=json_).pattern() == "\\[1, 2\\]"
    tag = {"format": {"type": "const_string", "value": "x"}}
    assert source(structural_tag=json.dumps(tag)).pattern() == "x"
    assert source(json_object=True).kind == "json"
    compact = source(json={"items": {"const": 1}}, disable_any_whitespace=True)
    assert " " not in compact.pattern().replace("[^\\x00-", "")
    spaced = source(json={"items": {"const": 1}}, whitespace_pattern="[ \\t]*")
    assert spaced.pattern() != compact.pattern()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"regex": "a\0"}, "NUL"),
        ({"choice": []}, "at least one"),
        ({"json_object": False}, "is true or left out"),
        ({"json": "{"}, "no JSON"),
        ({"json": ""}, "no JSON"),
    ],
)
def test_what_is_not_supported(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ConstraintError, match=says):
        source(**asked)


def test_the_tokens_of_a_tokenizer_are_bytes(tmp_path: Path) -> None:
    folder = write_byte_model(tmp_path / "LLaDA-bytes")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = Vocabulary.of_tokenizer(tokenizer, 260)
    assert vocabulary.size == 260
    data, cuts = vocabulary.data.tobytes(), vocabulary.offsets.tolist()
    texts = [data[one:other] for one, other in zip(cuts, cuts[1:], strict=False)]
    spelled = dict(zip(vocabulary.ids.tolist(), texts, strict=True))
    assert {token: bytes([token]) for token in range(256)}.items() <= spelled.items()
    assert MASK not in spelled and EOS not in spelled


def test_a_cache_forgets_what_was_not_asked_for_longest() -> None:
    cache = Cache(most=2)
    for text in ("a", "b"):
        cache.put(job(text), job(text).run())
    assert isinstance(cache.get(job("a")), Compiled)
    cache.put(job("["), job("[").run())
    assert cache.get(job("b")) is None
    assert isinstance(cache.get(job("[")), ConstraintError)
    assert len(cache) == 2


def test_a_cache_is_bounded_in_bytes() -> None:
    cache = Cache(most_bytes=20_000)
    sizes = []
    for i in range(40):
        cache.put(job(f"a{{{i + 1}}}"), job(f"a{{{i + 1}}}").run())
        sizes.append(cache.num_bytes)
    assert max(sizes) <= 20_000 and len(cache) < 40
    cache.put(job("a{40}"), job("a{40}").run())
    assert cache.num_bytes == sizes[-1]


def test_other_ends_and_bars_are_another_constraint() -> None:
    one = job("a")
    assert one.key != Job(one.source, one.vocabulary, "bytes", (255,)).key
    assert one.key != Job(one.source, one.vocabulary, "bytes", (256,), (97,)).key
    assert one.key == job("a").key


class Body(BaseModel):
    response_format: Any = None
    seen: list[int] = []


def test_a_handler_waits_for_a_thread_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is tried again with a body of its own, and compiled once for two."""
    go, begun, runs = Event(), Event(), []
    real = Job.run

    def slow(self: Job, *args: Any) -> Any:
        runs.append(self.key)
        begun.set()
        assert go.wait(60)
        return real(self, *args)

    monkeypatch.setattr(Job, "run", slow)
    wanted = job("abc?")
    bodies = []

    async def answer(body: Body) -> str:
        body.seen.append(1)
        bodies.append(list(body.seen))
        return structured._compiled(wanted).pattern

    async def other() -> str:
        await asyncio.to_thread(begun.wait, 60)
        # The loop is free while the pattern is compiled.
        go.set()
        return "other"

    async def together() -> list[str]:
        body = Body(response_format={"type": "json_object"})
        return await asyncio.gather(
            waiting.with_constraints(body, answer),
            waiting.with_constraints(body, answer),
            other(),
        )

    assert asyncio.run(together()) == ["abc?", "abc?", "other"]
    assert len(runs) == 1
    assert bodies == [[1]] * 4


def test_the_wrapped_handler_tries_again_with_the_body_as_it_was_sent() -> None:
    bodies = []

    async def original(self: Any, request: Any, raw_request: Any = None) -> str:
        bodies.append(request)
        assert request.tools is None
        # Parsers of tools write into the body.
        request.tools = []
        return structured._compiled(job("handled")).pattern

    handler = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(dlm_class="A"))
    )
    body = ChatCompletionRequest(
        messages=[{"role": "user", "content": "a"}],
        response_format={"type": "json_object"},
    )
    for given in ((body,), (body, None)):
        assert asyncio.run(handle(CHAT)(original)(handler, *given)) == "handled"
    first, second, third = bodies
    assert len({id(each) for each in (body, first, second, third)}) == 4


def test_what_cannot_be_compiled_is_told_to_the_handler() -> None:
    wanted = job("(?=x)unheard")

    async def answer(_: Body) -> str:
        return structured._compiled(wanted).pattern

    body = Body(response_format={"type": "json_object"})
    with pytest.raises(ConstraintError, match="look-around"):
        asyncio.run(waiting.with_constraints(body, answer))


def test_the_servers_config_counts() -> None:
    asked = StructuredOutputsParams(json={"type": "object"})
    params = SamplingParams(structured_outputs=asked)
    said = StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)
    config: Any = SimpleNamespace(structured_outputs_config=said)
    waiting.add_the_servers(params, config)
    assert params.structured_outputs is not None
    assert params.structured_outputs.disable_any_whitespace
    assert not params.structured_outputs.disable_additional_properties
    # The caller's object may serve many requests.
    assert not asked.disable_any_whitespace


def test_without_a_server_nobody_is_waited_for() -> None:
    assert structured._compiled(job("offline")).pattern == "offline"
