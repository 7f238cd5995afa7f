# SPDX-License-Identifier: Apache-2.0
"""What all drafters share: limits, clipping, failure; with a drafter of the test's."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spec_decode.harness import MAX_MODEL_LEN, Engine, Rounds, params, ragged_prompts
from tiers import fast

from vllm_dlm.spec_decode.drafter import Batch, Drafter, Drafts
from vllm_dlm.spec_decode.options import REQUEST_KEY, SpecDecPlusPlus
from vllm_dlm.spec_decode.sampling import draw_drafts
from vllm_dlm.spec_decode.worker import SpeculativeWorker, probability_bytes

PROPOSER = "spec_decode.test_drafter:Scripted"


class Scripted(Drafter):
    """Drafts what `script` says: right tokens, wrong ones, too many, or an error."""

    script: Callable[[Batch], Drafts] | None = None

    def load_model(self, target_model: Any) -> None:
        self.model = target_model
        self._draft_attn_layer_names = set()

    def initialize_attn_backend(self, *args: Any, **kwargs: Any) -> None:
        """It has no layers."""

    def draft(self, batch: Batch) -> Drafts:
        assert self.script is not None
        return self.script(batch)


@pytest.fixture(scope="module")
def engine(draft: Path, engines: Callable[..., Engine]) -> Engine:
    own = SpecDecPlusPlus.proposer
    SpecDecPlusPlus.proposer = PROPOSER
    engine = engines(
        {"method": "specdec++", "model": str(draft), "num_speculative_tokens": 6}
    )
    SpecDecPlusPlus.proposer = own
    return engine


@pytest.fixture(autouse=True)
def not_failed(engine: Engine) -> Iterator[None]:
    yield
    engine.drafter.failed = False


def right_tokens(texts: dict[tuple[int, ...], list[int]], longer: int = 0) -> Any:
    """Drafts the tokens that plain decoding writes, `longer` than they may be."""

    def script(batch: Batch) -> Drafts:
        drafts = []
        for row, limit in enumerate(batch.limits):
            tokens = batch.token_ids[row, : batch.num_tokens[row]].tolist()
            [whole] = [
                [*prompt, *text]
                for prompt, text in texts.items()
                if tokens[: len(prompt)] == list(prompt)
            ]
            drafts.append(whole[len(tokens) : len(tokens) + limit + longer])
        return Drafts(drafts)

    return script


@pytest.mark.parametrize(
    ("count", "longer"),
    fast((3, 3), of=[(3, 3), *itertools.product((1, 8), (0, 3))]),
)
def test_right_drafts_to_the_end_of_the_context(
    engine: Engine, plain: Engine, count: int, longer: int
):
    prompts = ragged_prompts(count)
    wanted = plain.run(prompts, params(MAX_MODEL_LEN))
    assert [len(p) + len(t) for p, t in zip(prompts, wanted, strict=True)] == [
        MAX_MODEL_LEN
    ] * count
    texts = dict(zip(map(tuple, prompts), wanted, strict=True))
    engine.drafter.script = right_tokens(texts, longer)
    rounds = Rounds(engine.drafter)
    assert engine.run(prompts, params(MAX_MODEL_LEN)) == wanted
    rounds.close()
    assert not engine.drafter.failed
    for of_request in rounds.of.values():
        # All accepted: each round gives its draft and one token more.
        ends = [len(tokens) for tokens, _ in of_request]
        gains = [len(draft) + 1 for _, draft in of_request]
        assert [b - a for a, b in itertools.pairwise(ends)] == gains[:-1]
        # Where one token is left, there is nothing to draft.
        assert MAX_MODEL_LEN - 1 <= ends[-1] + gains[-1] <= MAX_MODEL_LEN


def test_wrong_drafts_change_nothing(engine: Engine, plain: Engine):
    prompts = ragged_prompts(4)
    wanted = plain.run(prompts, params(30))
    engine.drafter.script = lambda batch: Drafts(
        [[(int(n) + 7 * i) % 64 for i in range(m)] for n, m in enumerate(batch.limits)]
    )
    assert engine.run(prompts, params(30)) == wanted


def test_a_request_may_ask_for_shorter_drafts_or_none(engine: Engine, plain: Engine):
    prompts = ragged_prompts(3)
    wanted = plain.run(prompts, params(20))
    texts = dict(zip(map(tuple, prompts), wanted, strict=True))
    engine.drafter.script = right_tokens(texts)
    own = [params(20, extra_args={REQUEST_KEY: n}) for n in (0, 2, 6)]
    rounds = Rounds(engine.drafter)
    assert engine.run(prompts, own) == wanted
    rounds.close()
    longest = [max(len(draft) for _, draft in r) for r in rounds.of.values()]
    assert longest == [2, 6]


def test_a_drafter_that_fails_leaves_plain_decoding(
    engine: Engine, plain: Engine, caplog: pytest.LogCaptureFixture
):
    prompts = ragged_prompts(4)
    wanted = plain.run(prompts, params(20))
    calls = []

    def script(batch: Batch) -> Drafts:
        calls.append(batch)
        if len(calls) == 4:
            raise RuntimeError("the drafter is out of order")
        return Drafts([[5] * limit for limit in batch.limits])

    engine.drafter.script = script
    assert engine.run(prompts, params(20)) == wanted
    assert len(calls) == 4
    assert engine.drafter.failed


def test_where_other_ranks_would_wait_for_it_a_failure_ends_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def fails() -> list[list[int]]:
        raise RuntimeError("this rank is out of memory")

    parallel = engine.drafter.vllm_config.parallel_config
    monkeypatch.setattr(parallel, "tensor_parallel_size", 2)
    with pytest.raises(RuntimeError, match="this rank is out of memory"):
        engine.drafter.draft_or_nothing(fails)
    assert not engine.drafter.failed


def test_attached_probabilities_leave_less_memory_for_keys_and_values(
    engine: Engine, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    points = engines({"method": "aded", "num_speculative_tokens": 6})
    measured = 1 << 20
    base = SpeculativeWorker.__bases__[0]
    monkeypatch.setattr(base, "determine_available_memory", lambda self: measured)

    def available(engine: Engine, set_by_the_user: int | None = None) -> int:
        cache = engine.worker.cache_config
        monkeypatch.setattr(cache, "kv_cache_memory_bytes", set_by_the_user)
        return engine.worker.determine_available_memory()

    # Requests, drafted tokens, vocabulary, bytes; what is kept, and a copy of it.
    taken = 8 * 6 * 64 * 4 * 2
    assert available(engine) == measured - taken
    scheduler = engine.runner.vllm_config.scheduler_config
    with monkeypatch.context() as context:
        context.setattr(scheduler, "max_num_batched_tokens", 40)
        assert available(engine) == measured - 40 * 64 * 4 * 2
    assert available(points) == measured
    measured = taken
    with pytest.raises(ValueError, match="max_num_seqs times num_speculative_tok"):
        available(engine)
    assert available(engine, set_by_the_user=measured) == measured


def test_the_memory_that_is_reserved_holds_what_a_step_takes(engine: Engine):
    """Of all requests, at full length."""
    most = probability_bytes(engine.runner.vllm_config)
    found = []

    def script(batch: Batch) -> Drafts:
        probs = torch.full((len(batch.limits), 6, 64), 1 / 64)
        return Drafts([[5] * limit for limit in batch.limits], probs)

    def record(metadata: Any) -> Any:
        copied = known(metadata)
        if copied is not None:
            found.append(copied.nbytes + engine.runner._draft_probs.nbytes)
        return copied

    known = engine.runner._get_spec_decode_draft_probs
    engine.runner._get_spec_decode_draft_probs = record
    engine.drafter.script = script
    engine.run(ragged_prompts(8), params(12, temperature=1.0))
    engine.runner._get_spec_decode_draft_probs = known
    assert max(found) == most


@pytest.mark.slow
def test_requests_share_a_steps_token_budget(
    engine: Engine, plain: Engine, monkeypatch: pytest.MonkeyPatch
):
    """What vLLM could not verify in the next step is not drafted."""
    found: dict[int, set[int]] = defaultdict(set)

    def script(batch: Batch) -> Drafts:
        found[len(batch.limits)] |= set(batch.limits.tolist())
        return Drafts([[5] * limit for limit in batch.limits])

    engine.drafter.script = script
    scheduler = engine.runner.scheduler_config
    monkeypatch.setattr(scheduler, "max_num_batched_tokens", 26)
    prompts = ragged_prompts(8)
    options = [params(10 + 4 * number) for number in range(8)]
    assert engine.run(prompts, options) == plain.run(prompts, options)
    most = {rows: max(limits) for rows, limits in found.items()}
    share = {rows: min(6, 26 // rows - 1) for rows in found}
    assert all(most[rows] <= share[rows] for rows in found)
    assert any(most[rows] == share[rows] < 6 for rows in found)


def test_a_text_may_end_as_soon_as_it_has_min_tokens(engine: Engine, plain: Engine):
    """Also where the token that ends it comes behind an accepted draft."""
    prompts = ragged_prompts(4)
    texts = plain.run(prompts, params(30, min_tokens=30))
    # The last place that has a token for the first time: its token ends the text.
    ends = [max(text.index(token) for token in text) for text in texts]
    own = [
        params(30, min_tokens=end, stop_token_ids=[text[end]])
        for text, end in zip(texts, ends, strict=True)
    ]
    wanted = [text[: end + 1] for text, end in zip(texts, ends, strict=True)]
    assert min(ends) > 1 and plain.run(prompts, own) == wanted
    known = {
        tuple(prompt): text[:end]
        for prompt, text, end in zip(prompts, texts, ends, strict=True)
    }
    engine.drafter.script = right_tokens(known)
    rounds = Rounds(engine.drafter)
    assert engine.run(prompts, own) == wanted
    rounds.close()
    assert all(any(draft for _, draft in of) for of in rounds.of.values())


def test_drafts_are_drawn_from_what_is_attached():
    """And by seed and position alone."""
    torch.manual_seed(0)
    rows, vocab = 4000, 6
    logits = torch.randn(1, vocab).repeat(rows, 1)
    temperature = torch.full((rows,), 0.7)
    top_k = torch.full((rows,), 5)
    top_p = torch.full((rows,), 0.9)
    seeds = torch.arange(rows)
    positions = torch.full((rows,), 3)
    tokens, probs = draw_drafts(
        logits, temperature, top_k, top_p, seeds, positions, banned_ids=[1]
    )
    assert (probs == probs[0]).all() and probs[0, 1] == 0
    assert (probs[0] == 0).sum() >= 2 and abs(float(probs[0].sum()) - 1) < 1e-6
    frequency = torch.bincount(tokens, minlength=vocab) / rows
    assert (frequency - probs[0]).abs().max() < 0.03
    again, _ = draw_drafts(
        logits[7:8],
        temperature[:1],
        top_k[:1],
        top_p[:1],
        seeds[7:8],
        positions[:1],
        banned_ids=[1],
    )
    assert again[0] == tokens[7]
    greedy, certain = draw_drafts(
        logits[:2],
        torch.zeros(2),
        top_k[:2],
        top_p[:2],
        seeds[:2],
        positions[:2],
    )
    assert greedy.tolist() == [int(logits[0].argmax())] * 2
    assert certain[0, greedy[0]] == 1 and certain.sum() == 2
