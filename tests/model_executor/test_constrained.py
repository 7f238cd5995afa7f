# SPDX-License-Identifier: Apache-2.0
"""Steps of requests with patterns, without an engine: whatever is written, texts match.

What a strategy writes is a random part of the candidates; now and then it masks some
of them again.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_dlm.config.canvas import Canvas
from vllm_dlm.constraints.automaton import ConstraintError, compile_pattern
from vllm_dlm.constraints.paths import Completions, Graph
from vllm_dlm.constraints.vocabulary import Vocabulary
from vllm_dlm.model_executor import patterns
from vllm_dlm.model_executor.constrained import Constrained
from vllm_dlm.model_executor.planning.block_rows import (
    CANVAS_END,
    COLUMNS,
    NOT_READ,
    NOT_VALID,
)
from vllm_dlm.model_executor.sampling.choice import Choice
from vllm_dlm.model_executor.sampling.logits import Logits
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.strategies.joint import JointParams

CPU = torch.device("cpu")
TEXTS = [bytes([byte]) for byte in range(97, 103)] + [
    *("é".encode()[:1], "é".encode()[1:], b"ab", b"abc", b"1", b"12", b'"', b'":'),
    *(b",", b"{", b"}", b"", b""),
]
VOCAB = len(TEXTS)
EOS, MASK = VOCAB - 2, VOCAB - 1


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> Vocabulary:
    made = Vocabulary.of_tokens(TEXTS)
    monkeypatch.setattr(patterns, "vocabulary_of", lambda config: made)
    return made


def pattern(choose: random.Random, depth: int = 4) -> str:
    kind = choose.random()
    if depth == 0 or kind < 0.25:
        atoms = ["a", "b", "é", "[abc]", r"\d", "[^a]", "ab", '"a":', r"\{", "1", "12"]
        return choose.choice(atoms)
    if kind < 0.5:
        return pattern(choose, depth - 1) + pattern(choose, depth - 1)
    if kind < 0.7:
        return f"({pattern(choose, depth - 1)}|{pattern(choose, depth - 1)})"
    return f"({pattern(choose, depth - 1)}){choose.choice(['*', '?', '{1,3}'])}"


class Head:
    """Logits that are there already."""

    vocab_shard = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def gathered(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class Decoder:
    """One request, decoded block after block by random logits."""

    def __init__(
        self,
        choose: random.Random,
        text: str,
        length: int,
        block: int,
        canvas: Canvas | None = None,
        **sampling: Any,
    ) -> None:
        self.choose, self.block = choose, block
        self.prompt_len = choose.randrange(1, 2 * block)
        self.begin = self.prompt_len - choose.randrange(min(block, self.prompt_len))
        self.length = length
        self.end = self.prompt_len + length
        self.table = RequestSlots(2, self.end + 2 * block, MASK, CPU)
        facts: Any = SimpleNamespace(
            device=CPU, vocab_size=VOCAB, mask_id=MASK, max_model_len=1000,
            defaults=SimpleNamespace(no_text=(MASK,)),
            model_config=SimpleNamespace(
                tokenizer="", tokenizer_revision="", get_vocab_size=lambda: VOCAB
            ),
        )  # fmt: skip
        usual: dict[str, Any] = {
            "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
            "logit_bias": None, "bad_words_token_ids": None, "allowed_token_ids": None,
            "min_tokens": 0, "max_tokens": length, "extra_args": None,
        }  # fmt: skip
        params = SimpleNamespace(**usual | sampling)
        text_end = self.begin + -(-(self.end - self.begin) // block) * block
        self.layout = SimpleNamespace(
            prompt_len=self.prompt_len, text_end=text_end, canvas=canvas
        )
        least = params.min_tokens
        if canvas is not None:
            least = max(least, canvas.pins_end)
        self.table.requests[0] = SimpleNamespace(  # type: ignore[assignment]
            id="", params=params, layout=self.layout, pattern=text, stop_ids=(EOS,),
            seed=choose.randrange(1000), measures_drawn=False, min_tokens=least,
            config=SimpleNamespace(strategy="joint", params=JointParams()),
        )  # fmt: skip
        self.params = params
        self.written = np.zeros(text_end, dtype=bool)
        self.written[: self.prompt_len] = True
        if canvas is not None:
            at = slice(self.prompt_len, self.end)
            self.written[at] = ~canvas.is_hole
            self.table.tokens[0, at] = torch.tensor(canvas.tokens, dtype=torch.int32)
        self.may_change = np.arange(text_end) >= self.prompt_len
        self.may_change &= ~self.written
        self.constrained = Constrained(self.table, facts)
        self.constrained.add(0, [MASK] * self.prompt_len)
        self.steps = 0
        host = self.table.host
        host.window[0] = host.block_length[0] = block

    def run(self) -> list[int]:
        """All tokens of the output."""
        start = self.begin
        while start < self.layout.text_end:
            step = 0
            stop = min(start + self.block, self.layout.text_end)
            while not self.written[start:stop].all():
                self.step(start, stop, step)
                step += 1
            start = stop
        found: list[int] = self.table.tokens[0, self.prompt_len : self.end].tolist()
        return found

    def step(self, start: int, stop: int, step: int) -> None:
        host, choose = self.table.host, self.choose
        masked = ~self.written[start:stop]
        host.block_start[0], host.step[0] = start, step
        host.masked[0, : stop - start] = masked
        (open_,) = masked.nonzero()
        if choose.random() < 0.3:
            open_ = open_[: choose.randrange(1, len(open_) + 1)]
        if choose.random() < 0.5:
            # And what the model thinks of what is written.
            decided = (self.may_change[start:stop] & ~masked).nonzero()[0]
            open_ = np.union1d(open_, decided)
        row_at = np.full((1, self.block), NOT_VALID)
        row_at[0, : stop - start] = NOT_READ
        row_at[0, open_] = np.arange(len(open_))
        packed = np.zeros((1, COLUMNS + self.block), dtype=np.int32)
        packed[0, CANVAS_END] = self.layout.text_end
        rows: Any = SimpleNamespace(
            slots_np=np.array([0]), row_at_np=row_at, packed_np=packed,
            valid_np=row_at > NOT_VALID, branches=None, first_row=0,
        )  # fmt: skip
        values = torch.from_numpy(
            np.random.default_rng(choose.randrange(1 << 30))
            .normal(0, choose.choice([1.0, 4.0, 40.0]), (len(open_), VOCAB))
            .astype(np.float32)
        )
        choice = Choice.room_for(len(open_), CPU)
        choice.candidate.copy_(values.argmax(dim=1))
        self.constrained.prepare(SimpleNamespace(groups=[rows]), {})  # type: ignore[arg-type]
        logits = Logits(Head(), values, choose.randrange(1, 9), MASK, None)
        for part, tile in logits.tiles():
            self.constrained.measure(part, tile, logits, choice.part(part))
        self.constrained.choose(choice)
        assert choice.logsumexp.isfinite().all(), "no path"
        assert ((choice.confidence >= 0) & (choice.confidence <= 1)).all()
        if choose.random() < 0.1:
            self.check_posterior(logits, choice, rows)
        count = choose.randrange(1, len(open_) + 1)
        for row in choose.sample(range(len(open_)), count):
            place = start + int(open_[row])
            self.table.tokens[0, place] = choice.candidate[row].int()
            self.written[place] = True
        if self.layout.canvas is None and choose.random() < 0.15:
            for place in range(max(start, self.prompt_len), stop):
                if choose.random() < 0.3:
                    self.table.tokens[0, place], self.written[place] = MASK, False
        self.constrained.after_step()

    def check_posterior(self, logits: Logits, choice: Choice, rows: Any) -> None:
        """Probabilities of all tokens are those that the path's tokens have."""
        made = self.constrained.probabilities(logits, choice.logsumexp, rows)
        if self.layout.text_end > self.end:
            return  # Rows behind the text are the model's own.
        everything = torch.arange(VOCAB).expand(1, self.block, VOCAB)
        posterior = made.of(everything)[0][torch.from_numpy(rows.row_at_np[0] >= 0)]
        chosen = posterior.gather(1, choice.candidate[:, None])[:, 0]
        torch.testing.assert_close(posterior.sum(1), torch.ones(len(posterior)))
        torch.testing.assert_close(chosen, choice.confidence, rtol=1e-4, atol=1e-6)


def assert_matches(text: str, tokens: list[int], least: int = 0) -> None:
    if EOS in tokens:
        end = tokens.index(EOS)
        assert end >= least
        assert {*tokens[end:]} == {EOS}
        tokens = tokens[:end]
    written = b"".join(TEXTS[token] for token in tokens).decode()
    assert re.fullmatch(text, written, re.ASCII), (text, written)


HEAT: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.5, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.4, "min_p": 0.1},
    {"logit_bias": {0: 5.0, 3: -5.0}},
]


def decode(seed: int) -> bool:
    """One random request; False where the pattern does not fit."""
    choose = random.Random(seed)
    text = pattern(choose)
    vocabulary = Vocabulary.of_tokens(TEXTS)
    try:
        automaton = compile_pattern(text, vocabulary, (EOS,), (MASK,))
    except ConstraintError:
        return False
    length = max(choose.choice([5, 8, 16, 24]), int(automaton.min_length[0]))
    if length > 60:
        return False
    block = choose.choice([1, 3, 4, 8, 16, 64])
    heat = dict(choose.choice(HEAT))
    heat["min_tokens"] = choose.choice([0, 0, 3])
    graph = Graph.of(automaton)
    if not Completions(automaton, graph, length, heat["min_tokens"]).at(0)[0]:
        heat["min_tokens"] = 0
    least = heat.get("min_tokens", 0)
    tokens = Decoder(choose, text, length, block, **heat).run()
    assert_matches(text, tokens, least)
    if choose.random() < 0.4:
        # The same with some of these tokens pinned.
        kept = [token if choose.random() < 0.3 else MASK for token in tokens]
        if MASK in kept and EOS not in kept:
            canvas = Canvas.of_ids(kept, MASK)
            heat.pop("min_tokens", None)
            again = Decoder(choose, text, length, block, canvas, **heat).run()
            assert_matches(text, again)
            pairs = zip(kept, again, strict=True)
            assert all(pin in (MASK, token) for pin, token in pairs)
    return True


def test_whatever_is_written_texts_match():
    assert sum(decode(seed) for seed in range(20)) > 13


@pytest.mark.slow
def test_hundreds_of_texts_match():
    assert sum(decode(1000 + seed) for seed in range(500)) > 350
