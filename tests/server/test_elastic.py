# SPDX-License-Identifier: Apache-2.0
"""Holes that widen and narrow, over HTTP: the answers are the oracle's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from engine.cases import make_prompt
from engine.elastic_cases import EOS, EVENTFUL_SHIFTED, EXPAND, Infill
from reference.checkpoints import write_checkpoint
from reference.dreamon import Filled
from reference.network import TinyModel
from server.launch import REPLY_SECONDS, SIZES, VLLM, Server, running_server
from server.test_documented import shown_requests

pytestmark = pytest.mark.slow  # a server of its own

MORE = {"dlm_holes": "elastic", "dlm_initial_hole": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "DreamOn-v0-7B"
    return write_checkpoint("dream", folder, seed=5, expand_token_id=EXPAND)


@pytest.fixture(scope="module")
def dreamon(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # What a server decodes others by does not count for these requests.
    command = [VLLM, "serve", str(folder), *SIZES, "--max-model-len", "256"]
    command += ["--dlm-strategy", "threshold", "--dlm-cache", "dual"]
    command += ["--dlm-block-length", "8", "--dlm-eotp", "block"]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(command, log, model=str(folder)) as running:
        yield running


def words(tokens: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def ask(server: Server, case: Infill, **more: Any) -> Any:
    """By the field `suffix`, as a text."""
    return server.complete(
        list(case.prompt),
        suffix=words(case.suffix),
        max_tokens=case.most,
        logit_bias={str(EXPAND): case.widen, str(EOS): case.end},
        return_token_ids=True,
        vllm_xargs=MORE,
        **more,
    )


def published_cases() -> list[Infill]:
    table = [row for row in EVENTFUL_SHIFTED if row[3] is None]
    return [
        Infill(make_prompt(3 + n, n), make_prompt(1 + n % 5, 50 + n), *more)
        for n, *more in table
    ]


def assert_right(answer: Any, case: Infill, want: Filled) -> None:
    (choice,) = answer.choices
    assert choice.token_ids == want.tokens, case
    assert answer.usage.completion_tokens == len(want.tokens)
    text = [token for token in want.tokens if token != EOS]
    assert choice.text.split() == words(text).split()
    is_over = want.tokens[-1] == EOS
    assert choice.finish_reason == ("stop" if is_over else "length")


def test_suffix(dreamon: Server, folder: Path):
    """Alone and together, beside ordinary requests; streamed and not."""
    oracle = TinyModel.from_folder(folder)
    cases = published_cases()
    wanted = [case.expected(oracle, shift=1) for case in cases]
    seen = sum((one.seen for one in wanted), Counter())
    assert min(seen["goes"], seen["widens"], seen["text"]) >= 10
    for case, want in zip(cases, wanted, strict=True):
        assert_right(ask(dreamon, case), case, want)
    plain = dreamon.text([1, 2, 3], max_tokens=40)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, dreamon, case) for case in cases * 3]
        beside = [pool.submit(dreamon.text, [1, 2, 3], max_tokens=40) for _ in range(3)]
        for one, case, want in zip(asked, cases * 3, wanted * 3, strict=True):
            assert_right(one.result(), case, want)
        assert {one.result() for one in beside} == {plain}
    tokens: list[int] = []
    for chunk in ask(dreamon, cases[0], stream=True):
        tokens += chunk.choices[0].token_ids or []
    assert tokens == wanted[0].tokens
    dreamon.wait_until_idle()


def test_the_documented_request(dreamon: Server):
    """As it is shown, but for words that this tokenizer has."""
    ((_, path, body),) = shown_requests("dreamon")
    own = {"model": dreamon.model, "prompt": "t5 t6", "suffix": "t7 t8"}
    reply = httpx.post(f"{dreamon.url}{path}", json=body | own, timeout=REPLY_SECONDS)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] in ("stop", "length")


def test_a_hole_that_closes(dreamon: Server):
    """Nothing is written: an answer without a text, streamed and not."""
    case = Infill(make_prompt(4), (7, 8), most=9, end=100.0)
    (choice,) = ask(dreamon, case).choices
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [EOS], "stop")
    chunks = [chunk.choices[0] for chunk in ask(dreamon, case, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == ""
    assert chunks[-1].finish_reason == "stop"


def test_a_text_with_a_named_hole(dreamon: Server):
    """In a completion and in a chat, streamed and not: the text with what was written
    in the place of the hole, and the field."""
    options = {
        "vllm_xargs": MORE | {"dlm_canvas_text": "t1 {{name:9}}t2 t3"},
        "logit_bias": {str(EXPAND): 5.0, str(EOS): 4.0},
    }
    (choice,) = dreamon.complete([5, 6, 7], **options).choices
    field = choice.canvas_fields["name"]
    assert choice.text.split() == ["t1", *field.split(), "t2", "t3"]
    stream = [
        chunk.choices[0]
        for chunk in dreamon.complete([5, 6, 7], stream=True, **options)
    ]
    assert "".join(chunk.text for chunk in stream) == choice.text
    assert stream[-1].canvas_fields == {"name": field}
    (chat,) = dreamon.chat("t5", **options).choices
    field = chat.canvas_fields["name"]
    assert chat.message.content.split() == ["t1", *field.split(), "t2", "t3"]


def test_refused(dreamon: Server):
    for xargs, more, told, parameter in (
        ({"dlm_strategy": "klass"}, {}, "one of static", "vllm_xargs.dlm_strategy"),
        ({"dlm_step_map": True}, {}, "dlm_step_map", "vllm_xargs.dlm_step_map"),
        ({}, {"logprobs": 1}, "logprobs", "logprobs"),
        ({}, {"stop": "t3"}, "stop", "stop"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            dreamon.complete(
                [5, 6, 7], suffix="t1", max_tokens=9, vllm_xargs=MORE | xargs, **more
            )
        assert told in str(caught.value) and caught.value.param == parameter
