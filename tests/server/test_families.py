# SPDX-License-Identifier: Apache-2.0
"""Block-causal models over HTTP: answers are the oracle's, whoever else is served.

The server gets no flag of this package: block length, strategy and stop token are read
from the checkpoint, as a user's would be. The oracle and the server count in float32,
on tiny random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from engine.cases import is_near_tie, make_prompt
from reference.block_procedures import generate_blocks
from reference.checkpoints import write_checkpoint
from reference.families import COMMON
from reference.network import TinyModel
from reference.procedures import ReferenceResult
from reference.rules import Rule, View, static, threshold
from server.launch import SIZES, VLLM, Server, running_server, until
from tokenizers import Tokenizer

pytestmark = pytest.mark.slow

EOS = COMMON["eos_token_id"]
STOP = 11
"""An ordinary word that the checkpoints declare as a second end of text."""
PAGE = 128
"""Tokens in a KV page at most, vLLM's default on a CPU: prompts share whole pages."""


@dataclass(frozen=True)
class Served:
    """A checkpoint, and what its family has besides `generate_blocks`' defaults."""

    family: str
    folder: str
    """Its name says what the released repository's name says."""
    block: int
    at_least: str
    """What a step of its own strategy, threshold above 0.9, writes at the least."""
    oracle: dict[str, Any] = field(default_factory=dict)


SDAR = Served("sdar", "SDAR-4B-Chat-b8", 8, "scheduled")
FAST_DLLM = Served(
    "fast_dllm_v2",
    "Fast_dLLM_v2_7B",
    32,
    "best",
    {"shift": 1, "sub_block_length": 8},
)


@dataclass(frozen=True)
class Ask:
    """A greedy request, and what the oracle has to know of its options."""

    prompt: tuple[int, ...]
    max_tokens: int
    xargs: dict[str, Any] = field(default_factory=dict)
    rule: Callable[[], Rule] | None = None
    """None is the family's own."""
    steps_per_block: int | None = None
    ignore_eos: bool = True

    def of(self, server: Server, **options: Any) -> Any:
        """The server's completion."""
        return server.complete(
            list(self.prompt),
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            vllm_xargs=self.xargs,
            return_token_ids=True,
            **options,
        )


Expect = Callable[[Ask], ReferenceResult]


@pytest.fixture(
    scope="module",
    params=[SDAR, FAST_DLLM],
    ids=lambda served: served.family,
)
def served(request: pytest.FixtureRequest) -> Served:
    return request.param


@pytest.fixture(scope="module")
def folder(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / served.folder
    return write_checkpoint(served.family, folder, seed=2, dlm_stop_ids=[STOP])


@pytest.fixture(scope="module")
def family_server(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    command = [VLLM, "serve", str(folder), *SIZES, "--enable-prompt-tokens-details"]
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(command, log, model=str(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def words(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def expect(served: Served, folder: Path) -> Expect:
    """`expect(ask)`: the oracle's answer."""
    model = TinyModel.from_folder(folder)

    def decode(ask: Ask) -> ReferenceResult:
        rule = ask.rule or (
            lambda: threshold(0.9, strict=True, at_least=served.at_least)
        )

        def observe(view: View, chosen: list[int]) -> None:
            # Two float32 programs may order nearly equal scores either way.
            assert not is_near_tie(rule(), view, chosen), "choose another prompt"

        return generate_blocks(
            model,
            list(ask.prompt),
            max_tokens=ask.max_tokens,
            block_length=served.block,
            rule=rule(),
            steps_per_block=ask.steps_per_block,
            eos_ids={model.eos_id, STOP},
            eos_stop=not ask.ignore_eos,
            observe=observe,
            **served.oracle,
        )

    return decode


@pytest.fixture(scope="module")
def crowd() -> list[Ask]:
    """Nine requests with the model's own strategy; most texts end inside a block."""
    lengths = (1, 7, 8, 9, 21, 32, 33, 50, 90)
    return [
        Ask(make_prompt(length, seed=1), 5 * (number + 1), ignore_eos=number % 2 == 0)
        for number, length in enumerate(lengths)
    ]


def ask_together(server: Server, asks: Sequence[Ask]) -> list[list[int]]:
    """The tokens of each, asked at once."""
    with ThreadPoolExecutor(len(asks)) as pool:
        replies = list(pool.map(lambda ask: ask.of(server), asks))
    return [reply.choices[0].token_ids for reply in replies]


# -- the model's own decoding -------------------------------------------------


def test_answers_are_the_oracles(
    family_server: Server, expect: Expect, crowd: list[Ask]
):
    wanted = [expect(ask).tokens for ask in crowd]
    assert ask_together(family_server, crowd) == wanted
    # Alone as in company.
    for ask, tokens in zip(crowd[::3], wanted[::3], strict=True):
        assert ask.of(family_server).choices[0].token_ids == tokens


def test_usage_and_ends(
    family_server: Server, expect: Expect, crowd: list[Ask], words: Tokenizer
):
    reasons = set()
    for ask in crowd:
        reply, wanted = ask.of(family_server), expect(ask).tokens
        [choice] = reply.choices
        assert reply.usage.prompt_tokens == len(ask.prompt)
        assert reply.usage.completion_tokens == len(wanted)
        is_ended = not ask.ignore_eos and wanted[-1] in (EOS, STOP)
        assert choice.finish_reason == ("stop" if is_ended else "length")
        reasons.add(choice.finish_reason)
        # A text begins with the space that parts it from the prompt.
        assert choice.text.split() == words.decode(wanted).split()
    assert reasons == {"stop", "length"}


def test_the_declared_stop_token_ends_a_text(family_server: Server):
    only_stop = {"max_tokens": 20, "logit_bias": {str(STOP): 100}}
    ended = family_server.complete([5, 6], **only_stop)
    [choice] = ended.choices
    assert (choice.finish_reason, choice.stop_reason) == ("stop", STOP)
    assert ended.usage.completion_tokens == 1
    ignored = family_server.complete([5, 6], ignore_eos=True, **only_stop)
    assert ignored.usage.completion_tokens == 20


def test_a_stream_is_the_same_text(family_server: Server, crowd: list[Ask]):
    ask = crowd[-1]
    whole = ask.of(family_server)
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(ask.of(family_server, stream=True, **usage))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert sum(bool(piece.text) for piece in pieces) >= 2
    assert "".join(piece.text for piece in pieces) == whole.choices[0].text
    streamed = [token for piece in pieces for token in piece.token_ids]
    assert streamed == whole.choices[0].token_ids
    assert chunks[-1].usage.completion_tokens == ask.max_tokens


def test_chat_is_a_completion_of_the_rendered_prompt(
    family_server: Server, expect: Expect, words: Tokenizer
):
    question = "t12 t5 t44 t9"
    rendered = (
        "<|startoftext|> <|start_header_id|> user <|end_header_id|> "
        f"{question} <|eot_id|> <|start_header_id|> assistant <|end_header_id|>"
    )
    ids = words.encode(rendered, add_special_tokens=False).ids
    wanted = expect(Ask(tuple(ids), 30)).tokens
    chat = family_server.chat(
        question, max_tokens=30, ignore_eos=True, return_token_ids=True
    )
    assert chat.usage.prompt_tokens == len(ids)
    assert chat.choices[0].token_ids == wanted


def test_a_stop_string_cuts_the_text(family_server: Server, crowd: list[Ask]):
    ask = crowd[-1]
    text = ask.of(family_server).choices[0].text
    stop = text.split()[len(text.split()) // 2]
    [choice] = ask.of(family_server, stop=stop).choices
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_seeded_choices_repeat(family_server: Server, crowd: list[Ask]):
    ask = crowd[-1]

    def draw(seed: int) -> list[list[int]]:
        reply = ask.of(family_server, n=2, temperature=0.8, seed=seed)
        assert reply.usage.completion_tokens == 2 * ask.max_tokens
        return [choice.token_ids for choice in reply.choices]

    first, second = draw(3)
    assert first != second
    with ThreadPoolExecutor(2) as pool:
        again, other = pool.map(draw, (3, 4))
    assert again == [first, second]
    assert other != [first, second]


def test_a_long_prompts_pages_are_found_again(family_server: Server, expect: Expect):
    ask = Ask(make_prompt(2 * PAGE + 45), 30)
    hits = "prefix_cache_hits_total"
    [before] = family_server.metrics(hits)
    first, second = ask.of(family_server), ask.of(family_server)
    assert not first.usage.prompt_tokens_details.cached_tokens
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 2 * PAGE <= cached < len(ask.prompt)
    wanted = expect(ask).tokens
    assert first.choices[0].token_ids == second.choices[0].token_ids == wanted
    until(
        lambda: family_server.metrics(hits)[0] - before == cached,
        "the metrics count the pages that were found",
    )


# -- options of a request -----------------------------------------------------


def with_options(served: Served) -> list[Ask]:
    """Requests that set options of their own; each option changes its answer."""
    options: list[tuple[dict[str, Any], Callable[[], Rule], int | None]] = [
        (
            {"dlm_strategy": "static", "dlm_mode": "left_to_right"},
            lambda: static("left_to_right"),
            None,
        ),
        ({"dlm_strategy": "static", "dlm_steps_per_block": 3}, static, 3),
        (
            {"dlm_threshold": 0.3},
            lambda: threshold(0.3, strict=True, at_least=served.at_least),
            None,
        ),
        (
            {"dlm_threshold": 0.5, "dlm_strict": "false", "dlm_at_least": "best"},
            lambda: threshold(0.5),
            None,
        ),
    ]
    return [
        Ask(make_prompt(13 + number, seed=4), 37, xargs, rule, steps)
        for number, (xargs, rule, steps) in enumerate(options)
    ]


def test_options_of_a_request(
    family_server: Server, served: Served, expect: Expect, crowd: list[Ask]
):
    asks = [*with_options(served), *crowd]
    wanted = [expect(ask).tokens for ask in asks]
    for ask in with_options(served):
        assert expect(ask) != expect(Ask(ask.prompt, ask.max_tokens)), ask.xargs
    assert ask_together(family_server, asks) == wanted


def test_the_metrics_count_steps_and_tokens(
    family_server: Server, served: Served, expect: Expect
):
    names = (
        "diffusion_num_denoising_steps_total",
        "diffusion_num_committed_tokens_total",
    )
    for ask in with_options(served):
        family_server.wait_until_idle()
        steps, tokens = family_server.metrics(*names)
        wanted = expect(ask)
        ask.of(family_server)
        until(
            lambda tokens=tokens, wanted=wanted: (
                family_server.metrics(names[1])[0] - tokens >= len(wanted.tokens)
            ),
            "tokens are missing in the metrics",
        )
        assert family_server.metrics(names[0])[0] - steps == wanted.forwards


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    # id: (options of a request, what the message must hold)
    "another block length": (
        {"dlm_block_length": 16},
        ["block_length is", "--dlm-block-length"],
    ),
    "the whole canvas": (
        {"dlm_block_length": "canvas"},
        ["block_length is", "--dlm-block-length"],
    ),
    "a cache policy": ({"dlm_cache": "prefix"}, ["'prefix'", "leave it at 'none'"]),
    "steps without a schedule": (
        {"dlm_strategy": "factor", "dlm_steps_per_block": 4},
        ["steps_per_block would be ignored", "'factor'", "static, threshold with"],
    ),
    "steps twice": (
        {"dlm_steps": 8, "dlm_steps_per_block": 2},
        ["set steps or steps_per_block, not both"],
    ),
}


def test_a_refused_request_hurts_nobody(
    family_server: Server, expect: Expect, crowd: list[Ask]
):
    wanted = [expect(ask).tokens for ask in crowd]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask_together, family_server, crowd)
        for options, fragments in REFUSED.values():
            with pytest.raises(openai.BadRequestError) as caught:
                family_server.complete([5, 6], max_tokens=8, vllm_xargs=options)
            message = caught.value.body["message"]
            assert not [part for part in fragments if part not in message], message
        assert running.result() == wanted
    family_server.wait_until_idle()


def test_a_client_that_leaves_hurts_nobody(
    family_server: Server, expect: Expect, crowd: list[Ask]
):
    endless = Ask(make_prompt(40), 900, {"dlm_strategy": "static"})
    family_server.wait_until_idle()
    streams = [endless.of(family_server, stream=True) for _ in range(3)]
    for stream in streams:
        next(iter(stream))
    assert family_server.load()[0] == 3
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask_together, family_server, crowd)
        for stream in streams:
            stream.close()
        assert running.result() == [expect(ask).tokens for ask in crowd]
    family_server.wait_until_idle()
