# SPDX-License-Identifier: Apache-2.0
"""Logits exist a tile at a time: no more memory for more requests, the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.cases import Case, make_prompt
from engine.harness import Engine, Finished
from engine.test_mixed import make_request, one_per_strategy
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dlm.model_executor.sampling.logits import tile_rows
from vllm_dlm.model_executor.sampling.sampler import DenoisingSampler

ROWS = 7
"""Of a tile: fewer than a block has, and no divisor of it."""


@contextmanager
def tiles_of(engine: Engine, rows: int) -> Iterator[list[int]]:
    """Rows of every tile of logits meanwhile."""
    measured, seen = engine.runner.sampler.rows, []
    usual, head = measured.facts, engine.runner.model.logits_processor

    def note(module, args, output) -> None:
        seen.append(len(output))

    hook = head.register_forward_hook(note)
    measured.facts = replace(usual, tile_rows=rows)
    try:
        yield seen
    finally:
        measured.facts = usual
        hook.remove()


def test_small_tiles_change_nothing(wide_engine: Engine):
    """Every strategy, and every fourth request drawn, sixteen at a time."""
    rules = sorted(one_per_strategy().values())
    requests = [make_request(i, rule) for i, rule in enumerate(rules)]
    prompts, sampling = zip(*requests, strict=True)
    wanted = wide_engine.run(prompts, sampling)
    with tiles_of(wide_engine, ROWS) as seen:
        got = wide_engine.run(prompts, sampling)
    assert [(r.tokens, r.forwards) for r in got] == [
        (r.tokens, r.forwards) for r in wanted
    ]
    assert max(seen) == ROWS


RESTRICTED = {
    "logprobs": {"logprobs": 3},
    "bias": {"logit_bias": {20: 3.0, 21: 2.0}},
    "allowed": {"allowed_token_ids": list(range(10, 60))},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": list(range(40))},
    "bad_words": {"temperature": 0.8, "seed": 4, "top_p": 0.9},
    "nucleus": {"temperature": 1.2, "seed": 4, "top_k": 30, "min_p": 0.01},
}


def test_small_tiles_keep_what_sampling_parameters_ask(wide_engine: Engine):
    cases = [
        Case(make_prompt(9 + i, i), block=16, max_tokens=32, ignore_eos=True)
        for i in range(len(RESTRICTED))
    ]
    prompts = [case.prompt for case in cases]
    sampling = [
        case.params(**more)
        for case, more in zip(cases, RESTRICTED.values(), strict=True)
    ]
    wanted = wide_engine.run(prompts, sampling)
    with tiles_of(wide_engine, ROWS) as seen:
        got = wide_engine.run(prompts, sampling)
    assert got == wanted
    assert max(seen) == ROWS
    assert top_logprobs(got[0]) == pytest.approx(top_logprobs(wanted[0]), abs=1e-4)


def top_logprobs(result: Finished) -> list[float]:
    """Of each token, those of the most probable ones."""
    logprobs = result.output.logprobs
    assert logprobs is not None
    return [entry.logprob for step in logprobs for entry in step.values()]


def test_a_tile_does_not_grow_with_the_batch(wide_engine: Engine):
    """As many rows as fit, whatever is in the batch."""
    case = Case(make_prompt(8), block=32, max_tokens=32, ignore_eos=True)
    for requests in (1, 4, 16):
        with tiles_of(wide_engine, 48) as seen:
            wide_engine.run([case.prompt] * requests, case.params())
        assert max(seen) == min(32 * requests, 48)


@pytest.mark.parametrize(
    ("rule", "passes"),
    [("static/low_confidence", 1), ("credit/fixed", 2), ("klass", 3)],
)
def test_rows_that_are_computed_again_are_few_and_counted(
    wide_engine: Engine, rule: str, passes: int
):
    """A pass for the statistics, one for each question about probabilities.

    Beside requests that ask none: their rows and those of decided positions are not
    computed again.
    """
    rules = [rule, rule, "static/low_confidence"]
    cases = [
        Case(make_prompt(9 + i, i), rule=rule, block=16, max_tokens=16, ignore_eos=True)
        for i, rule in enumerate(rules)
    ]
    prompts, sampling = [case.prompt for case in cases], [c.params() for c in cases]
    alone = [rows_of(wide_engine, [case.prompt], [case.params()]) for case in cases]
    together = rows_of(wide_engine, prompts, sampling)
    most = max(len(rows) for rows in alone)
    padded = [rows + [0] * (most - len(rows)) for rows in alone]
    assert together == [sum(step) for step in zip(*padded, strict=True)]
    again = [
        (passes - 1) * (step[0] + step[1])
        for step in zip(*padded, strict=True)
        if sum(step) > ROWS
    ]
    wide_engine.flush()
    counted = wide_engine.scheduler._work[1]
    with tiles_of(wide_engine, ROWS) as seen:
        wide_engine.run(prompts, sampling)
    assert sum(seen) == sum(together) + sum(again)
    assert wide_engine.scheduler._work[1] - counted == sum(seen)


def rows_of(engine: Engine, prompts: list[Any], sampling: list[Any]) -> list[int]:
    """Rows through lm_head in each step, where a tile has room for all of them."""
    with tiles_of(engine, 1 << 20) as seen:
        engine.run(prompts, sampling)
    return seen


class LongestOverVocabulary(TorchDispatchMode):
    """Rows of the longest tensor [rows, vocabulary] that any operation makes."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.rows = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None) -> Any:
        result = call(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            shape = made.shape if isinstance(made, torch.Tensor) else ()
            if len(shape) > 1 and shape[-1] == self.vocab_size:
                self.rows = max(self.rows, shape[:-1].numel())
        return result


def test_no_tensor_over_the_vocabulary_is_longer_than_a_tile(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Not for draws, restrictions, log-probabilities or `Probabilities` either."""
    cases = [
        Case(make_prompt(9 + i, i), rule=rule, block=16, max_tokens=16, ignore_eos=True)
        for i, rule in enumerate(
            ["klass", "credit/fixed", *["static/low_confidence"] * 6]
        )
    ]
    sampling = [
        case.params(**more)
        for case, more in zip(cases, [{}, {}, *RESTRICTED.values()], strict=True)
    ]
    vocab_size = wide_engine.runner.model.logits_processor.org_vocab_size
    longest = LongestOverVocabulary(vocab_size)
    decide = DenoisingSampler.__call__

    def watched(*args: Any) -> Any:
        with longest:
            return decide(*args)

    monkeypatch.setattr(DenoisingSampler, "__call__", watched)
    with tiles_of(wide_engine, ROWS):
        wide_engine.run([case.prompt for case in cases], sampling)
    assert longest.rows == ROWS


def test_tiles_of_real_sizes():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tile_rows(126464, torch.bfloat16, cuda) == 2122
    assert tile_rows(126464, torch.bfloat16, cpu) == 265
    assert tile_rows(32000, torch.float32, cpu) == 524
    assert tile_rows(1 << 40, torch.float32, cpu) == 1
