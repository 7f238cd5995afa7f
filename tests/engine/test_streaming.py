# SPDX-License-Identifier: Apache-2.0
"""Tokens come out as soon as they are final and nothing left of them is open."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, product

import pytest
from engine.cases import RULES, Case, Expected, expect, make_prompt
from engine.harness import Engine
from reference.llada import TinyLLaDA
from reference.procedures import CACHES
from tiers import fast
from vllm.sampling_params import RequestOutputKind


def out_after(expected: Expected, forward: int) -> int:
    """How many tokens are final, from the left, after a forward (from 0)."""
    for place, written in enumerate(expected.written_at):
        if written > forward:
            return place
    return len(expected.tokens)


@pytest.mark.parametrize(
    ("cache", "count"), fast(("dual", 4), of=[("dual", 4), *product(CACHES, (8,))])
)
def test_tokens_stream_when_they_are_final(
    engine: Engine, oracle: TinyLLaDA, cache: str, count: int
):
    """After every forward of every request, exactly what the oracle has final."""
    cases = [
        Case(
            make_prompt(4 + 5 * number, number),
            rule,
            cache,
            block=16,
            max_tokens=28,
            ignore_eos=number % 2 == 0,
            seed=number,
        )
        for number, rule in enumerate(RULES)
    ]
    met = ((case, expect(case, oracle)) for case in cases)
    # At most eight at a time start together; the oracle decodes no more.
    clear = ((case, expected) for case, expected in met if not expected.near_tie)
    both = list(islice(clear, count))
    assert len(both) >= count - 1
    ids = [engine.add(case.prompt, case.params()) for case, _ in both]
    seen: list[list[int]] = [[] for _ in both]
    early = forward = 0
    while engine.busy:
        outputs = {output.request_id: output for output in engine.step()}
        for i, (case, expected) in enumerate(both):
            if ids[i] in outputs:
                tokens = list(outputs[ids[i]].outputs[0].token_ids)
                assert tokens[: len(seen[i])] == seen[i]
                assert len(tokens) > len(seen[i])
                assert outputs[ids[i]].finished == (forward == expected.forwards - 1)
                early += len(tokens) % case.block > 0
                seen[i] = tokens
            assert seen[i] == expected.tokens[: out_after(expected, forward)], case
        forward += 1
    assert forward == max(expected.forwards for _, expected in both)
    assert early >= 2.5 * count


@pytest.mark.parametrize("cache", fast("none", of=CACHES))
def test_left_to_right_streams_token_by_token(engine: Engine, cache: str):
    case = Case(
        make_prompt(12),
        "static/left_to_right",
        cache,
        block=32,
        max_tokens=40,
        ignore_eos=True,
    )
    sampling = case.params(output_kind=RequestOutputKind.DELTA)
    engine.add(case.prompt, sampling)
    pieces = []
    while engine.busy:
        pieces += [output.outputs[0].token_ids for output in engine.step()]
    assert [len(piece) for piece in pieces] == [1] * 40
    (whole,) = engine.run([case.prompt], case.params())
    assert [token for piece in pieces for token in piece] == whole.tokens


def test_eos_ends_a_request_at_once(engine: Engine, oracle: TinyLLaDA):
    """In the middle of a block, with masks to its right, and the pages are free."""
    ends = 0
    for length in range(1, 40):
        case = Case(make_prompt(length, 5), "factor", "dual", block=32, max_tokens=32)
        expected = expect(case, oracle)
        whole = expect(replace(case, ignore_eos=True), oracle)
        if expected.forwards >= whole.forwards:
            continue
        ends += 1
        pages = engine.free_pages
        engine.add(case.prompt, case.params())
        for _ in range(expected.forwards - 1):
            assert not any(output.finished for output in engine.step())
        (output,) = engine.step()
        assert output.finished
        assert list(output.outputs[0].token_ids) == expected.tokens
        assert engine.free_pages == pages
        assert not engine.busy
        if ends == 2:
            return
    raise AssertionError("too few ends")
