# SPDX-License-Identifier: Apache-2.0
"""DEER on real engines: right texts, and drafts as a plain network makes them.

On both of vLLM's model runners: V1, and V2, on a CPU with our kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spec_decode.deer_reference import (
    BLOCK,
    MASKS,
    PROMPTS,
    TO_THE_END,
    Reference,
    Steps,
    luck,
    speculative,
)
from spec_decode.harness import (
    MAX_MODEL_LEN,
    Engine,
    Rounds,
    params,
    ragged_prompts,
)
from tiers import fast
from vllm.v1.sample.rejection_sampler import rejection_sample

from vllm_dlm.spec_decode.options import REQUEST_KEY
from vllm_dlm.spec_decode.sampling import draw_drafts

SHORT = [prompt[-length:] for length, prompt in enumerate(ragged_prompts(8)[2:], 4)]
"""All computed in one step: on a CPU, vLLM takes no seed beside a chunked prompt."""


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    made: dict[str, Reference] = {}

    def reference(family: str) -> Reference:
        if family not in made:
            made[family] = Reference(family, tmp_path_factory.mktemp(family))
        return made[family]

    return reference


@pytest.fixture(scope="module")
def deer(
    references: Callable[..., Reference], engines: Callable[..., Engine]
) -> Callable[..., Engine]:
    def engine(family: str, context: str = "auto", **options: Any) -> Engine:
        return engines(speculative(references(family).folder, context), **options)

    return engine


@pytest.fixture(scope="module")
def wanted(plain: Engine) -> list[list[int]]:
    """What the target writes alone, to the end of its context."""
    return plain.run(PROMPTS, TO_THE_END)


CASES = [
    (*case, runner)
    for case in [
        ("llada", "auto", "recompute"),
        ("sdar", "auto", "cached"),
        ("nemotron", "auto", "cached"),
        ("sdar", "recompute", "recompute"),
        ("nemotron", "recompute", "recompute"),
        ("dream", "auto", "recompute"),
        ("fast_dllm_v2", "auto", "cached"),
        ("llada2", "auto", "cached"),
    ]
    for runner in (1, 2)
]


@pytest.mark.parametrize(
    ("family", "asked", "context", "runner"),
    fast(("sdar", "auto", "cached", 1), ("llada", "auto", "recompute", 2), of=CASES),
)
def test_texts_and_drafts(
    family: str,
    asked: str,
    context: str,
    runner: int,
    wanted: list[list[int]],
    deer: Callable[..., Engine],
    references: Callable[..., Reference],
):
    engine = deer(family, asked, runner=runner)
    assert engine.worker.use_v2_model_runner == (runner == 2)
    assert engine.drafter.context == context
    assert engine.run(PROMPTS[2:3], TO_THE_END[2:3]) == wanted[2:3]
    assert engine.run(PROMPTS[1::3], TO_THE_END[1::3]) == wanted[1::3]
    rounds = Rounds(engine.drafter)
    with luck(engine.drafter, wanted):
        assert engine.run(PROMPTS, TO_THE_END) == wanted
    rounds.close()
    assert not engine.drafter.failed
    assert references(family).check(rounds, every=12) > 15
    texts = [[len(text) for text, _ in r] for r in rounds.of.values()]
    assert max(after - now for r in texts for now, after in pairwise(r)) == MASKS + 1
    ends = [len(text) + len(draft) for r in rounds.of.values() for text, draft in r]
    assert max(ends) == MAX_MODEL_LEN - 1


@pytest.mark.parametrize(
    ("family", "context", "runner"),
    fast(
        ("sdar", "cached", 1),
        ("llada", "recompute", 2),
        of=[
            ("llada", "recompute", 1),
            ("sdar", "cached", 1),
            ("nemotron", "cached", 1),
            ("llada", "recompute", 2),
            ("sdar", "cached", 2),
        ],
    ),
)
def test_rows_are_those_that_are_new(
    family: str, context: str, runner: int, deer: Callable[..., Engine]
):
    engine = deer(family, runner=runner)
    # Unlike all other prompts: nothing of it is in the prefix cache.
    prompt = [7, *PROMPTS[2][::-1]]
    steps = Steps(engine.drafter)
    engine.run([prompt], params(40))
    steps.close()

    wanted = steps.counts(context, BLOCK if family == "sdar" else 1)
    assert engine.drafter.counts == wanted
    assert wanted["head_rows"] > 30 * MASKS


CROWDED = {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 13}
"""Prompts come in chunks, and there are pages for half of the requests."""


@pytest.mark.slow
@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("family", ["sdar", "nemotron", "llada"])
def test_chunks_preemption_and_shared_pages(
    family: str,
    runner: int,
    plain: Engine,
    deer: Callable[..., Engine],
    references: Callable[..., Reference],
):
    prefix = [3 + n % 50 for n in range(40)]
    prompts = [[*prefix, *prompt[:12]] for prompt in PROMPTS]
    ends = [params(MAX_MODEL_LEN - len(prompt)) for prompt in prompts]
    wanted = plain.run(prompts, ends)
    engine = deer(family, runner=runner, **CROWDED)
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    preempt = scheduler._preempt_request

    def note(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = note
    rounds = Rounds(engine.drafter)
    assert engine.run(prompts, ends) == wanted
    assert preempted
    # Again: what is left in the prefix cache is found.
    assert engine.run(prompts[:2], ends[:2]) == wanted[:2]
    rounds.close()
    assert not engine.drafter.failed
    assert references(family).check(rounds, every=2) > 100


@pytest.mark.slow
def test_more_rows_than_a_forward_holds(
    deer: Callable[..., Engine], references: Callable[..., Reference], wanted: Any
):
    """Whole texts are computed, 8 of them: more than vLLM computes in a step."""
    engine = deer("llada", **CROWDED)
    assert engine.drafter.most_rows == MAX_MODEL_LEN
    rounds = Rounds(engine.drafter)
    engine.drafter.counts.clear()
    assert engine.run(PROMPTS, TO_THE_END) == wanted
    rounds.close()
    counts = engine.drafter.counts
    assert counts["rows"] / counts["forwards"] > MAX_MODEL_LEN / 2
    assert counts["forwards"] > max(map(len, rounds.of.values()))
    references("llada").check(rounds, every=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "length"),
    [("llada", "max_sequence_length"), ("sdar", "max_position_embeddings")],
)
def test_a_drafter_of_a_shorter_context_drafts_as_far_as_it_goes(
    family: str,
    length: str,
    tmp_path: Path,
    engines: Callable[..., Engine],
    wanted: list[list[int]],
):
    reference = Reference(family, tmp_path / family, **{length: 60})
    engine = engines(speculative(reference.folder))
    rounds = Rounds(engine.drafter)
    assert engine.run(PROMPTS, TO_THE_END) == wanted
    rounds.close()
    assert not engine.drafter.failed
    reference.check(rounds, every=4)
    every = [(len(text), len(draft)) for r in rounds.of.values() for text, draft in r]
    assert max(text + width for text, width in every if width) == 60
    assert not any(width for text, width in every if text >= 60)


@pytest.mark.parametrize("runner", fast(1, of=(1, 2)))
def test_seeded_texts_do_not_depend_on_the_batch(
    runner: int, deer: Callable[..., Engine]
):
    engine = deer("llada", runner=runner)
    own = [
        params(12, temperature=0.9, top_k=20, top_p=0.9, seed=number)
        for number in range(len(SHORT))
    ]
    own[2] = params(12)
    together = engine.run(SHORT, own)
    assert not engine.drafter.failed
    for row in (0, 2, 4):
        assert engine.run([SHORT[row]], own[row]) == [together[row]]


def test_a_request_may_ask_for_shorter_drafts_or_none(deer: Callable[..., Engine]):
    """On runner V2; `test_drafter.py` has V1, where all methods share it."""
    engine = deer("llada", runner=2)
    own = [params(12, extra_args={REQUEST_KEY: n}) for n in (0, 2, MASKS)]
    wanted = engine.run(SHORT[:3], params(12, extra_args={REQUEST_KEY: 0}))
    rounds = Rounds(engine.drafter)
    assert engine.run(SHORT[:3], own) == wanted
    rounds.close()
    assert [max(len(draft) for _, draft in r) for r in rounds.of.values()] == [2, MASKS]


@pytest.mark.parametrize("runner", fast(2, of=(1, 2)))
def test_drawn_drafts_are_those_of_their_distributions(
    runner: int, deer: Callable[..., Engine], references: Callable[..., Reference]
):
    """Tokens and attached probabilities, in a batch with a greedy request."""
    engine, found = deer("sdar", runner=runner), []
    draft = engine.drafter.draft

    def record(batch: Any) -> Any:
        drafts = draft(batch)
        found.append((batch, batch.token_ids.copy(), drafts))
        return drafts

    engine.drafter.draft = record
    options = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5}
    engine.run(SHORT[:2], [params(12, **options), params(12)])
    engine.drafter.draft = draft
    assert not engine.drafter.failed
    drawn = 0
    for batch, texts, drafts in found:
        for row, tokens in enumerate(drafts.tokens):
            if not tokens:
                continue
            sampling, count = batch.parameters[row], len(tokens)
            text = texts[row, : batch.num_tokens[row]].tolist()
            wanted, probs = draw_drafts(
                references("sdar").logits(text, count),
                torch.full((count,), sampling.temperature),
                torch.full((count,), sampling.top_k),
                torch.full((count,), sampling.top_p),
                torch.full((count,), 5),
                torch.arange(len(text), len(text) + count),
            )
            assert tokens == wanted.tolist()
            torch.testing.assert_close(
                drafts.probs[row, :count], probs, atol=1e-4, rtol=1e-3
            )
            drawn += sampling.temperature > 0
    assert drawn > 5


def test_verification_is_the_papers(plain: Engine):
    """p = [.5, .3, .2], q = [.2, .6, .2]; `plain`: vLLM's kernels are in place."""
    torch.manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.6, 0.2])
    rows = 20_000
    drafts, probs = draw_drafts(
        q.log().repeat(rows, 1),
        torch.ones(rows),
        torch.zeros(rows, dtype=torch.int64),
        torch.ones(rows),
        torch.arange(rows),
        torch.zeros(rows, dtype=torch.int64),
    )
    tokens = rejection_sample(
        drafts.int(),
        [1] * rows,
        1,
        torch.arange(1, rows + 1, dtype=torch.int32),
        probs,
        p.log().repeat(rows, 1),
        torch.full((rows, 1), 2, dtype=torch.int32),
        SimpleNamespace(
            all_greedy=False,
            all_random=True,
            temperature=torch.ones(rows),
            generators={},
        ),
    )
    accepted = tokens[:, 1] == 2  # the bonus token follows
    assert (tokens[accepted, 0] == drafts[accepted]).all()
    assert (tokens[~accepted, 0] == 0).all()  # norm(max(0, p - q)) = [1, 0, 0]
    assert abs(accepted.float().mean() - 0.7) < 0.015
    assert abs(accepted[drafts == 1].float().mean() - 0.5) < 0.015
    assert accepted[drafts != 1].all()
    frequency = torch.bincount(tokens[:, 0], minlength=3) / rows
    assert (frequency - p).abs().max() < 0.015


@pytest.mark.slow  # `test_drafter.py` has it for all methods
@pytest.mark.parametrize("runner", (1, 2))
def test_a_drafter_that_fails_leaves_plain_decoding(
    runner: int, deer: Callable[..., Engine], wanted: list[list[int]]
):
    engine = deer("sdar", runner=runner)
    drafter, calls = engine.drafter, []
    draw = drafter._draw

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("out of memory, say")
        return draw(*args)

    drafter._draw = fail
    try:
        assert engine.run(PROMPTS[:2], TO_THE_END[:2]) == wanted[:2]
        assert drafter.failed and len(calls) == 4
    finally:
        drafter._draw, drafter.failed = draw, False
