# SPDX-License-Identifier: Apache-2.0
"""SpecDec++ on real engines: right texts, and drafts as a plain loop makes them.

The plain loop is transformers' model, one request and one token at a time, without a
cache. It says for every round what has to be drafted, and when drafting has to stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from spec_decode.harness import MAX_MODEL_LEN, Engine, Rounds, params, ragged_prompts
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from vllm_dlm.spec_decode.sampling import draw_drafts
from vllm_dlm.spec_decode.specdec_pp.head import HEAD_FILE, AcceptanceHead

THRESHOLD = 0.6
MIN_TOKENS = 2
MAX_TOKENS = 6

PROMPTS = ragged_prompts(8)
SHORT = [prompt[-length:] for length, prompt in enumerate(ragged_prompts(8)[2:], 4)]
"""All computed in one step: on a CPU, vLLM takes no seed beside a chunked prompt."""
TO_THE_END = [params(MAX_MODEL_LEN - len(prompt)) for prompt in PROMPTS]


def write_head(folder: Path, hidden_size: int, bias: float) -> AcceptanceHead:
    """A random head, surer of acceptance the larger the bias."""
    torch.manual_seed(5)
    head = AcceptanceHead(hidden_size)
    torch.nn.init.normal_(head.output.weight, std=0.25)
    head.output.bias.data = torch.tensor([0.0, bias])
    head.save(folder)
    return head


@dataclass
class Oracle:
    """What SpecDec++ drafts, after its paper."""

    network: Any
    head: AcceptanceHead
    stop_ids: Sequence[int] = ()

    @torch.no_grad()
    def draft(
        self, tokens: list[int], limit: int, drawn: SamplingParams | None = None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Tokens and their logits; greedy, or drawn as a request's are."""
        cumulated, drafted, logits = 1.0, [], []
        while True:
            text = torch.tensor([tokens + drafted])
            state = self.network.model(text).last_hidden_state[0, -1]
            if drafted:
                cumulated *= self.head(state).softmax(-1)[1].item()
            logits.append(self.network.lm_head(state))
            drafted.append(next_token(logits[-1], len(tokens) + len(drafted), drawn))
            enough = len(drafted) >= MIN_TOKENS
            if (
                len(drafted) == min(limit, MAX_TOKENS)
                or drafted[-1] in self.stop_ids
                or (enough and 1 - cumulated > THRESHOLD)
            ):
                return drafted, logits


def next_token(
    logits: torch.Tensor, position: int, drawn: SamplingParams | None
) -> int:
    if drawn is None:
        return int(logits.argmax())
    tokens, _ = draw_drafts(
        logits[None],
        torch.tensor([drawn.temperature]),
        torch.tensor([drawn.top_k]),
        torch.tensor([drawn.top_p]),
        torch.tensor([drawn.seed]),
        torch.tensor([position]),
    )
    return int(tokens)


def distribution(logits: torch.Tensor, drawn: SamplingParams) -> torch.Tensor:
    """[V], token by token: the most probable, at most top_k, until top_p is reached."""
    probs = (logits / drawn.temperature).softmax(-1)
    ranked = probs.sort(descending=True).indices.tolist()
    ranked = ranked[: drawn.top_k] if drawn.top_k > 0 else ranked
    whole, sum_so_far, kept = float(probs[ranked].sum()), 0.0, []
    for token in ranked:
        if sum_so_far < drawn.top_p * whole:
            kept.append(token)
            sum_so_far += float(probs[token])
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / sum_so_far
    return result


@dataclass
class Costs:
    """One call of the drafter: what it was asked, what it answered, what it counted."""

    num_tokens: int
    num_rows: int
    drafts: list[list[int]]
    probs: torch.Tensor | None
    forwards: int
    rows: int


class Calls(Rounds):
    """Rounds, and the drafter's counts of each."""

    def __init__(self, drafter: Any) -> None:
        super().__init__(drafter)
        self.costs: list[Costs] = []

    def _record(self, batch: Any) -> Any:
        before = self._drafter.counts.copy()
        drafts = super()._record(batch)
        spent = self._drafter.counts - before
        self.costs.append(
            Costs(
                len(batch.target_token_ids),
                len(batch.request_ids),
                drafts.tokens,
                drafts.probs,
                spent["forwards"],
                spent["rows"],
            )
        )
        return drafts


@pytest.fixture(scope="module")
def head(draft: Path) -> AcceptanceHead:
    return write_head(draft, hidden_size=64, bias=1.0)


@pytest.fixture(scope="module")
def oracle(draft: Path, head: AcceptanceHead) -> Oracle:
    network = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32)
    return Oracle(network, head)


@pytest.fixture(scope="module")
def engine(engines: Callable[..., Engine], draft: Path, head: AcceptanceHead) -> Engine:
    """Prompts are computed in chunks: all of them are more than a step takes."""
    return engines(
        {
            "method": "specdec++",
            "model": str(draft),
            "stop_threshold": THRESHOLD,
            "min_tokens": MIN_TOKENS,
            "num_speculative_tokens": MAX_TOKENS,
        },
        max_num_batched_tokens=64,
    )


@pytest.fixture
def calls(engine: Engine) -> Iterator[Calls]:
    calls = Calls(engine.drafter)
    yield calls
    calls.close()
    assert not engine.drafter.failed


def room(tokens: list[int]) -> int:
    return MAX_MODEL_LEN - len(tokens) - 1


def test_greedy_text_is_the_targets_and_drafts_are_the_oracles(
    engine: Engine, plain: Engine, oracle: Oracle, calls: Calls
) -> None:
    assert engine.run(PROMPTS, TO_THE_END) == plain.run(PROMPTS, TO_THE_END)
    assert len(calls.of) == len(PROMPTS)
    lengths = set()
    for rounds in calls.of.values():
        assert len(rounds[-1][0]) >= MAX_MODEL_LEN - MAX_TOKENS - 1
        for tokens, draft in rounds[::16] + rounds[-2:]:
            assert draft == oracle.draft(tokens, room(tokens))[0]
        lengths |= {len(draft) for _, draft in rounds}
    # The rule had something to say: from the fewest to the most tokens, and the limit.
    assert lengths == set(range(1, MAX_TOKENS + 1))
    # And rows that it had stopped were not computed.
    for call in calls.costs:
        lengths = [len(draft) for draft in call.drafts]
        assert call.forwards == max(1, *lengths)
        # The step's tokens and the next ones; then each draft but its last token.
        reads = sum(max(0, length - 1) for length in lengths)
        assert call.rows == call.num_tokens + call.num_rows + reads
    assert any(call.num_rows == len(PROMPTS) for call in calls.costs)


@pytest.mark.slow
def test_alone_as_in_a_batch(engine: Engine, calls: Calls) -> None:
    greedy = params(30)
    together = engine.run(PROMPTS, greedy)
    batched = dict(zip(map(tuple, PROMPTS), calls.of.values(), strict=True))
    for row in (2, 4):
        calls.of.clear()
        assert engine.run([PROMPTS[row]], greedy) == [together[row]]
        assert list(calls.of.values()) == [batched[tuple(PROMPTS[row])]]


@pytest.mark.slow
def test_a_draft_ends_with_a_stop_token(
    engine: Engine, plain: Engine, oracle: Oracle, calls: Calls
) -> None:
    stop_ids = list(range(20, 26))
    stopped = params(40, stop_token_ids=stop_ids)
    assert engine.run(PROMPTS, stopped) == plain.run(PROMPTS, stopped)
    rounds = [round for rounds in calls.of.values() for round in rounds]
    oracle = Oracle(oracle.network, oracle.head, stop_ids)
    for tokens, draft in rounds:
        assert draft == oracle.draft(tokens, len(draft))[0]
        assert not set(draft[:-1]) & set(stop_ids)
    assert any(draft[-1] in stop_ids for _, draft in rounds)


def test_drawn_drafts_come_with_what_they_were_drawn_from(
    engine: Engine, oracle: Oracle, calls: Calls
) -> None:
    cut = [{}, {"top_k": 7, "top_p": 0.99}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}]
    drawn = [
        params(12, temperature=0.8, seed=11 + row, **cut[row % len(cut)])
        for row in range(len(SHORT))
    ]
    together = engine.run(SHORT, drawn)
    batched = list(calls.of.values())
    for row, asked in enumerate(drawn[: len(cut)]):
        calls.of.clear()
        calls.costs.clear()
        assert engine.run([SHORT[row]], asked) == [together[row]]
        (rounds,) = calls.of.values()
        assert rounds == batched[row]
        costs = [call for call in calls.costs if call.drafts[0]]
        for (tokens, draft), call in list(zip(rounds, costs, strict=True))[::3]:
            expected, logits = oracle.draft(tokens, len(draft), asked)
            assert draft == expected
            probs = torch.stack([distribution(one, asked) for one in logits])
            torch.testing.assert_close(call.probs[0], probs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_greedy_rows_beside_drawn_ones(
    engine: Engine, plain: Engine, calls: Calls
) -> None:
    greedy = plain.run(SHORT, params(20))
    mixed = [params(20, temperature=row % 2, seed=7) for row in range(len(SHORT))]
    texts = engine.run(SHORT, mixed)
    assert texts[::2] == greedy[::2]
    assert texts[1::2] == engine.run(SHORT[1::2], mixed[1::2])
    assert texts[1] != greedy[1]


@pytest.mark.slow
def test_the_target_as_its_own_draft_is_always_accepted(
    engines: Callable[..., Engine], plain: Engine, target: Path, tmp_path: Path
) -> None:
    write_head(tmp_path, hidden_size=128, bias=40.0)
    engine = engines(
        {
            "method": "specdec++",
            "model": str(target),
            "head": str(tmp_path / HEAD_FILE),
            "num_speculative_tokens": MAX_TOKENS,
        }
    )
    calls = Calls(engine.drafter)
    for prompts in PROMPTS, PROMPTS[4:5]:
        calls.of.clear()
        ends = TO_THE_END if len(prompts) > 1 else TO_THE_END[4]
        assert engine.run(prompts, ends) == plain.run(prompts, ends)
        for prompt, rounds in zip(prompts, calls.of.values(), strict=True):
            # The prompt's step gives one token, each round a draft and one more; if a
            # single one is left, there is nothing to draft.
            outputs = MAX_MODEL_LEN - len(prompt)
            assert len(rounds) == -(-(outputs - 2) // (MAX_TOKENS + 1))
            assert {len(draft) for _, draft in rounds[:-1]} == {MAX_TOKENS}
    assert not engine.drafter.failed


def test_start_fails_without_a_head(target: Path, tmp_path: Path) -> None:
    speculative = {"method": "specdec++", "model": str(target), "head": str(tmp_path)}
    with pytest.raises(ValueError, match="vllm-dlm train specdec-head") as error:
        Engine(target, speculative)
    assert re.search(re.escape(str(tmp_path / HEAD_FILE)), str(error.value))

    write_head(tmp_path, hidden_size=64, bias=0.0)
    with pytest.raises(ValueError, match="width 64, the draft model's have width 128"):
        Engine(target, speculative)
