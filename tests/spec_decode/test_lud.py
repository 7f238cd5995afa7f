# SPDX-License-Identifier: Apache-2.0
"""LUD: drafts behind pads are the network's own, and change no text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spec_decode.harness import MAX_MODEL_LEN, Engine, Rounds, params, ragged_prompts
from spec_decode.test_del import TIGHT, preemptions
from transformers import AutoModelForCausalLM, LlamaConfig

from vllm_dlm.spec_decode.lud.proposer import kept, pad_token
from vllm_dlm.spec_decode.options import REQUEST_KEY, Lud

PAD = 3
LUD: dict[str, Any] = {
    "method": "lud",
    "pad_token_id": PAD,
    "num_speculative_tokens": 5,
}


def test_what_is_kept_of_a_draft():
    tokens, confidences = [7, 8, 9, 10], [0.4, 0.95, 0.92, 0.5]
    assert kept(tokens, confidences, 0.9, set()) == [7, 8, 9]
    assert kept(tokens, confidences, 0.0, set()) == tokens
    # A confidence that is exactly the threshold is not above it.
    assert kept(tokens, confidences, 0.95, set()) == [7]
    assert kept(tokens, confidences, 0.0, {8}) == [7, 8]


def config(**entries: Any) -> Any:
    return LlamaConfig(vocab_size=64, **entries)


def test_the_pad_token():
    trained = config(lud={"pad_token_id": 5, "tokens": 7})
    assert pad_token(Lud(), trained) == 5
    assert pad_token(Lud(pad_token_id=9), trained) == 9
    assert pad_token(Lud(pad_token_id=0), config()) == 0
    with pytest.raises(ValueError, match="vllm-dlm train lud"):
        pad_token(Lud(), config())
    with pytest.raises(ValueError, match="64 is outside the vocabulary of 64"):
        pad_token(Lud(pad_token_id=64), config())
    with pytest.raises(ValueError, match="must be a token id, not 'x'"):
        pad_token(Lud(), config(lud={"pad_token_id": "x"}))


@pytest.fixture(scope="module")
def lud(engines: Callable[..., Engine]) -> Engine:
    return engines(LUD)


def test_drafts_are_those_of_the_network(plain: Engine, lud: Engine, target: Path):
    """Greedy texts stay, to the end of the context, and each draft is transformers'."""
    prompts = ragged_prompts(4)
    many = [params(MAX_MODEL_LEN - 1 - len(prompt)) for prompt in prompts]
    rounds = Rounds(lud.drafter)
    texts = lud.run(prompts, many)
    rounds.close()
    assert texts == plain.run(prompts, many) and not lud.drafter.failed
    network = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    compared = 0
    for request in rounds.of.values():
        for tokens, draft in request[::5]:
            row = torch.tensor([tokens + [PAD] * (len(draft) - 1)])
            with torch.inference_mode():
                said = network(row).logits[0, len(tokens) - 1 :].argmax(-1)
            assert said.tolist() == draft
            compared += len(draft)
        # The first token of a draft is the target's next one: it is accepted.
        lengths = [len(tokens) for tokens, _ in request]
        assert min(b - a for a, b in zip(lengths, lengths[1:], strict=False)) >= 2
    assert compared > 100


@pytest.mark.slow
def test_neighbours_pages_and_limits(
    plain: Engine, lud: Engine, engines: Callable[..., Engine]
):
    prompts = ragged_prompts(8)
    own = [params(40, extra_args={REQUEST_KEY: n % 4}) for n in range(8)]
    wanted = plain.run(prompts, params(40))
    lud.drafter.counts.clear()
    assert lud.run(prompts, own) == wanted
    assert lud.run(prompts[:1], own[0]) == wanted[:1]
    assert lud.drafter.counts["rows"] == lud.drafter.counts["drafted"] > 0
    tight = engines(LUD, **TIGHT)
    with preemptions(tight) as preempted:
        assert tight.run(prompts, params(80)) == plain.run(prompts, params(80))
    assert preempted and not tight.drafter.failed


@pytest.mark.slow
def test_a_threshold_shortens_drafts(plain: Engine, engines: Callable[..., Engine]):
    engine = engines({**LUD, "threshold": 0.5})
    prompts = ragged_prompts(4)
    rounds = Rounds(engine.drafter)
    assert engine.run(prompts, params(40)) == plain.run(prompts, params(40))
    rounds.close()
    lengths = {len(draft) for request in rounds.of.values() for _, draft in request}
    assert 1 in lengths and max(lengths) <= 5


def test_a_checkpoint_that_was_not_trained_for_it(target: Path):
    with pytest.raises(ValueError, match="trained for it"):
        Engine(target, {"method": "lud"})
