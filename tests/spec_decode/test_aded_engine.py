# SPDX-License-Identifier: Apache-2.0
"""ADED in an engine: the text is plain decoding's, and who learns from whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spec_decode.harness import (
    MAX_MODEL_LEN,
    TIGHT,
    Engine,
    params,
    preemptions,
    ragged_prompts,
)
from tiers import fast

from vllm_dlm.spec_decode.aded import proposer
from vllm_dlm.spec_decode.aded.trigram_table import TrigramCounts, save_table

FEW = list(range(3, 9))
"""Allowed tokens, so few that a text's tri-grams come again."""

Drafts = dict[str, list[tuple[list[int], list[int]]]]
"""Request -> its rounds: all its tokens, and the draft behind them."""


@pytest.fixture(scope="module")
def corpus(plain: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tri-grams of what the target writes."""
    counts = TrigramCounts(64)
    for text in plain.run(
        [*ragged_prompts(1), *ragged_prompts(8)], params(MAX_MODEL_LEN)
    ):
        counts.add(text)
    path = tmp_path_factory.mktemp("corpus") / "trigrams.safetensors"
    save_table(path, counts.table())
    return path


MEMORIES = ("request", "shared")


@pytest.fixture(scope="module", params=fast("request", of=MEMORIES))
def started(
    request: pytest.FixtureRequest, engines: Callable[..., Engine], corpus: Path
) -> Engine:
    """With a corpus, and a memory of each request; or without, and a shared one."""
    memory = request.param
    speculative = {"method": "aded", "num_speculative_tokens": 5, "memory": memory}
    if memory == "request":
        speculative["corpus"] = str(corpus)
    return engines(speculative)


@pytest.fixture
def engine(started: Engine) -> Engine:
    """That has served nobody."""
    started.drafter.forget()
    return started


def is_shared(engine: Engine) -> bool:
    return engine.drafter.options.memory == "shared"


@pytest.fixture
def drafts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Drafts:
    found: Drafts = {}
    draft = engine.drafter.draft

    def record(request: str, text: Any, most: int) -> list[int]:
        tokens = draft(request, text, most)
        found.setdefault(request, []).append((text.tolist(), tokens))
        return tokens

    monkeypatch.setattr(engine.drafter, "draft", record)
    return found


@pytest.mark.parametrize("count", fast(8, of=(1, 8)))
def test_greedy_text_to_the_end_of_the_context(
    engine: Engine, plain: Engine, drafts: Drafts, count: int
):
    prompts = ragged_prompts(count)
    has_corpus = engine.drafter.options.corpus is not None
    whole_text = params(MAX_MODEL_LEN, allowed_token_ids=None if has_corpus else FEW)
    wanted = plain.run(prompts, whole_text)
    assert engine.run(prompts, whole_text) == wanted
    assert not engine.drafter.failed
    for prompt, text in zip(prompts, wanted, strict=True):
        whole = [*prompt, *text]
        [rounds] = [r for r in drafts.values() if r[0][0] == whole[: len(prompt) + 1]]
        for (tokens, draft), (after, _) in zip(rounds, rounds[1:], strict=False):
            # What was right of a draft was taken, and one token more.
            right = 0
            while right < len(draft) and whole[len(tokens) + right] == draft[right]:
                right += 1
            assert after == whole[: len(tokens) + right + 1]
    # The first token of a text comes without a draft.
    saved = sum(len(text) - 1 for text in wanted) - sum(map(len, drafts.values()))
    assert saved > 0.2 * sum(map(len, wanted))


def test_seeded_requests_do_not_influence_each_other(engine: Engine, drafts: Drafts):
    """Sampled: the noise of verification depends on how many tokens were drafted."""
    prompts = ragged_prompts(8)
    sampling = [
        params(24, temperature=1.0, seed=n, allowed_token_ids=FEW) for n in range(8)
    ]
    together = engine.run(prompts, sampling)
    in_batch = sorted(drafts.values())
    # Greedy ones, which teach a shared memory.
    engine.run(prompts, params(24, allowed_token_ids=FEW))
    if is_shared(engine):
        assert engine.drafter.shared.num_learned
    drafts.clear()
    some = range(1, 8, 2)
    alone = [engine.run([prompts[row]], sampling[row])[0] for row in some]
    assert alone == [together[row] for row in some]
    assert all(rounds in in_batch for rounds in drafts.values())
    assert len(drafts) == len(some)
    assert all(any(draft for _, draft in rounds) for rounds in in_batch)


def test_several_threads_draft_what_one_does(
    engine: Engine, drafts: Drafts, monkeypatch: pytest.MonkeyPatch
):
    prompts, sampling = ragged_prompts(8), params(40, allowed_token_ids=FEW)
    texts = engine.run(prompts, sampling)
    by_one = sorted(drafts.values())
    drafts.clear()
    engine.drafter.forget()
    recorded, threads = engine.drafter.draft, set()

    def draft(*args: Any) -> list[int]:
        threads.add(threading.current_thread())
        return recorded(*args)

    monkeypatch.setattr(engine.drafter, "draft", draft)
    monkeypatch.setattr(engine.drafter, "num_threads", 4)
    monkeypatch.setattr(proposer, "ROWS_PER_THREAD", 2)
    rows = engine.drafter.counts["rows"]
    assert engine.run(prompts, sampling) == texts
    assert sorted(drafts.values()) == by_one
    assert engine.drafter.counts["rows"] - rows == sum(map(len, by_one))
    assert threads - {threading.current_thread()}


def test_what_goes_with_a_request(engine: Engine, drafts: Drafts):
    engine.run(ragged_prompts(5), params(12))
    engine.run(ragged_prompts(2), params(12))
    assert set(engine.drafter.requests) == set(list(drafts)[-2:])
    memories = {id(request.memory) for request in engine.drafter.requests.values()}
    assert len(memories) == (1 if is_shared(engine) else 2)


def test_a_question_that_comes_again(engine: Engine, plain: Engine, drafts: Drafts):
    """A shared memory knows the answer; the text is the same."""
    prompts, options = ragged_prompts(3), params(40)
    wanted = plain.run(prompts, options)
    rounds = []
    for _ in range(2):
        drafts.clear()
        assert engine.run(prompts, options) == wanted
        rounds.append(sum(map(len, drafts.values())))
    first, second = rounds
    if is_shared(engine):
        # Drafts of 5 tokens: at best a sixth of the forwards of plain decoding.
        assert second < first / 2
    else:
        assert second == first


@pytest.mark.parametrize("started", MEMORIES, indirect=True)
def test_what_a_text_teaches(engine: Engine, plain: Engine, drafts: Drafts):
    """All of it, and no token that was accepted behind its end; and who teaches."""
    if not is_shared(engine):
        pytest.skip("what a request has taught is gone")
    prompt = ragged_prompts(2)[1]
    [whole] = plain.run([prompt], params(60))
    off = params(60, extra_args={"dlm_draft_tokens": 0})
    seeded = params(60, temperature=1.0, seed=1)
    memory = engine.drafter.shared
    engine.run([prompt, prompt], [off, seeded])
    assert not memory.num_learned
    assert engine.run([prompt], params(60)) == [whole]
    known = [*prompt, *whole]
    distinct = {tuple(known[place : place + 3]) for place in range(len(known) - 2)}
    assert memory.num_learned == len(distinct)
    for first, second, third in distinct:
        assert 0 < dict(memory.successors(first, second))[third] <= 3
    stop = whole[20]
    drafts.clear()
    [text] = engine.run([prompt], params(60, stop_token_ids=[stop]))
    assert text == whole[: whole.index(stop) + 1]
    [request], [rounds] = engine.drafter.requests.values(), drafts.values()
    assert request.num_seen == len(prompt) + len(text) < len(rounds[-1][0])


def test_requests_that_are_preempted(
    plain: Engine, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """Their text is computed anew, and taught once."""
    shared = {"memory": "shared", "memory_size": 1024}
    engine = engines({"method": "aded", "num_speculative_tokens": 5, **shared}, **TIGHT)
    taught: dict[str, list[int]] = {}
    teach = engine.drafter.teach

    def record(request: str, text: Any, num_new: int) -> None:
        taught.setdefault(request, []).append(len(text))
        teach(request, text, num_new)

    monkeypatch.setattr(engine.drafter, "teach", record)
    prompts, options = ragged_prompts(8), params(80)
    with preemptions(engine) as preempted:
        assert engine.run(prompts, options) == plain.run(prompts, options)
    assert preempted and not engine.drafter.failed
    assert len(taught) == 8
    for lengths in taught.values():
        assert lengths == sorted(set(lengths))
    assert 0 < engine.drafter.shared.num_learned <= 1024


def test_a_request_may_do_without(engine: Engine, plain: Engine, drafts: Drafts):
    prompts = ragged_prompts(2)
    own = [
        params(40, allowed_token_ids=FEW, extra_args={"dlm_draft_tokens": most})
        for most in (0, 2)
    ]
    wanted = plain.run(prompts, params(40, allowed_token_ids=FEW))
    assert engine.run(prompts, own) == wanted
    [rounds] = drafts.values()
    assert rounds[0][0][: len(prompts[1])] == prompts[1]
    assert max(len(draft) for _, draft in rounds) == 2


def test_a_failure_leaves_plain_decoding(
    engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
):
    prompts = ragged_prompts(4)
    calls = []

    def fail(*args: Any) -> list[int]:
        calls.append(args)
        raise RuntimeError("the drafter is out of order")

    monkeypatch.setattr(engine.drafter, "draft", fail)
    assert engine.run(prompts, params(20)) == plain.run(prompts, params(20))
    assert len(calls) == 1
    assert engine.drafter.failed
    engine.drafter.failed = False


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(96, "another vocabulary"), (0, "cannot read")]
)
def test_a_corpus_that_does_not_fit_is_refused(
    target: Path, tmp_path: Path, vocab_size: int, message: str
):
    path = tmp_path / "trigrams"
    if vocab_size:
        counts = TrigramCounts(vocab_size)
        counts.add([1, 2, 95])
        save_table(path, counts.table())
    with pytest.raises(ValueError, match=f"{message}.*count-trigrams"):
        Engine(target, {"method": "aded", "corpus": str(path)})
