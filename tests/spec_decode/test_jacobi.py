# SPDX-License-Identifier: Apache-2.0
"""Jacobi blocks: the next draft is what the target said behind the rejection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spec_decode.harness import MAX_MODEL_LEN, Engine, params, ragged_prompts
from spec_decode.test_del import TIGHT, preemptions
from tiers import fast
from transformers import AutoModelForCausalLM

from vllm_dlm.spec_decode.jacobi.proposer import behind, fill
from vllm_dlm.spec_decode.options import REQUEST_KEY

JACOBI: dict[str, Any] = {"method": "jacobi", "num_speculative_tokens": 6}


def test_a_block_comes_to_rest():
    """A model that says x + 1 modulo 10 behind x."""
    text, draft, states = [3], [9, 9, 9], []
    for _ in range(3):
        block = np.array([text[-1], *draft])
        states.append(text + draft)
        said = (block + 1) % 10
        agreed = 0
        while agreed < len(draft) and draft[agreed] == said[agreed]:
            agreed += 1
        emitted = said[: agreed + 1].tolist()
        draft = behind(said, len(emitted), 3)
        text += emitted
    states.append(text + draft)
    blocks = [[3, 9, 9, 9], [3, 4, 0, 0], [3, 4, 5, 1], [3, 4, 5, 6]]
    assert [state[:4] for state in states] == blocks
    assert states[2] == [3, 4, 5, 1, 1, 1] and draft == [2, 2, 2]


def test_places_of_which_nothing_is_known():
    prompt = np.array([11, 12, 13, 14, 15], np.int32)
    tokens = fill(prompt, 7, 200)
    assert {*tokens} == {*prompt.tolist()}
    # They depend on the place alone.
    assert fill(prompt, 17, 100) == tokens[10:110]
    assert fill(prompt, 7, 0) == []


@contextmanager
def recorded(engine: Engine) -> Iterator[dict[str, list[tuple[list[int], list[int]]]]]:
    """Request -> its rounds: all its tokens, and the draft behind them."""
    drafter, propose = engine.drafter, engine.drafter.propose
    found: dict[str, list[tuple[list[int], list[int]]]] = {}

    def record(sampled: Any, lengths: Any, texts: Any, slot_mappings: Any = None):
        drafts = propose(sampled, lengths, texts, slot_mappings)
        names = engine.runner.input_batch.req_ids
        for row, (name, draft) in enumerate(zip(names, drafts, strict=True)):
            if draft:
                text = texts[row, : lengths[row]].tolist()
                found.setdefault(name, []).append((text, list(draft)))
        return drafts

    drafter.propose = record
    yield found
    del drafter.propose


@pytest.fixture(scope="module")
def jacobi(engines: Callable[..., Engine]) -> Engine:
    return engines(JACOBI)


@pytest.mark.parametrize("count", fast(2, of=(2, 8)))
def test_drafts_are_those_of_a_plain_loop(
    plain: Engine, jacobi: Engine, target: Path, count: int
):
    """Greedy texts stay, to the end of the context."""
    prompts = ragged_prompts(count)
    many = [params(MAX_MODEL_LEN - 1 - len(prompt)) for prompt in prompts]
    with recorded(jacobi) as found:
        texts = jacobi.run(prompts, many)
    assert texts == plain.run(prompts, many) and not jacobi.drafter.failed
    network = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    guesses = 0
    for prompt, request in zip(prompts, found.values(), strict=True):
        first, draft = request[0]
        assert draft == fill(np.array(prompt), len(first), len(draft))
        for (before, draft), (after, following) in list(
            zip(request, request[1:], strict=False)
        )[::4]:
            with torch.inference_mode():
                said = network(torch.tensor([before + draft])).logits[0].argmax(-1)
            rest = said[len(after) - 1 : len(before + draft)].tolist()
            rest = rest[: len(following)]
            filled = fill(
                np.array(prompt), len(after) + len(rest), len(following) - len(rest)
            )
            assert following == rest + filled
            guesses += len(rest)
    assert guesses > 25 * count


@pytest.mark.slow
def test_neighbours_pages_and_limits(
    plain: Engine, jacobi: Engine, engines: Callable[..., Engine]
):
    prompts = ragged_prompts(8)
    own = [params(40, extra_args={REQUEST_KEY: n % 4}) for n in range(8)]
    assert jacobi.run(prompts, own) == plain.run(prompts, params(40))
    tight = engines(JACOBI, **TIGHT)
    with preemptions(tight) as preempted:
        assert tight.run(prompts, params(80)) == plain.run(prompts, params(80))
    assert preempted and not tight.drafter.failed
