# SPDX-License-Identifier: Apache-2.0
"""The plain loop and our engine write the same tokens: the comparison is of equals."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiers import fast

from vllm_dlm.bench.checkpoints import write_random
from vllm_dlm.bench.engine import Answer, Unsupported, Work
from vllm_dlm.bench.plain import PlainEngine
from vllm_dlm.bench.served import VllmEngine
from vllm_dlm.bench.shapes import RandomModel

BLOCK, NEW = 8, 24
SIZES = "random:d=64,layers=2,heads=2,mlp=128,vocab=256"
OPTIONS = {
    "dtype": "float32",
    "threads": 1,
    "seed": 0,
    "ends_texts": False,
    "max_concurrency": 4,
    "max_length": 96,
}
LENGTHS = (1, 8, 17, 30, 33)
PROMPTS = [random.Random(n).choices(range(254), k=n) for n in LENGTHS]


def pair(folder: Path, family: str) -> tuple[VllmEngine, PlainEngine]:
    """Both engines with the same random weights."""
    from vllm.distributed.parallel_state import destroy_model_parallel

    torch.set_num_threads(1)
    model = RandomModel.parse(f"{SIZES},family={family}")
    path = str(write_random(folder, model, block_length=BLOCK, seed=0))
    # Another test's engine may have left its groups.
    destroy_model_parallel()
    ours = VllmEngine({"enforce_eager": True}, "offline", step_times=True)
    ours.start(path, OPTIONS)
    plain = PlainEngine(softmax="float32")
    plain.start(path, OPTIONS)
    return ours, plain


@pytest.fixture(scope="module")
def full_attention(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[VllmEngine, PlainEngine]]:
    ours, plain = pair(tmp_path_factory.mktemp("llada"), "llada")
    yield ours, plain
    ours.stop()


@pytest.fixture(scope="module")
def block_causal(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[VllmEngine, PlainEngine]]:
    ours, plain = pair(tmp_path_factory.mktemp("sdar"), "sdar")
    yield ours, plain
    ours.stop()


def work(strategy: str, **options) -> Work:
    return Work(NEW, 4, ignore_eos=True, strategy=strategy, **options)


def answered(engine: VllmEngine | PlainEngine, job: Work) -> list[Answer]:
    done = []
    answers = engine.generate(PROMPTS, job, lambda: done.append(1))
    assert len(done) == len(PROMPTS)
    return answers


COMPARED = [
    *itertools.product(
        ("static", "threshold"), ("none", "prefix", "dual"), (None, 12, 9)
    )
]


@pytest.mark.parametrize(
    ("strategy", "cache", "steps"),
    fast(("threshold", "dual", 12), of=COMPARED),
)
def test_full_attention(full_attention, strategy, cache, steps):
    job = work(strategy, cache=cache, steps=steps, block_length=BLOCK)
    ours, plain = (answered(engine, job) for engine in full_attention)
    assert [a.tokens for a in ours] == [a.tokens for a in plain]
    assert [a.forwards for a in ours] == [a.forwards for a in plain]
    assert {len(a.tokens) for a in ours} == {NEW}
    if strategy == "static":
        assert {a.forwards for a in ours} == {steps or NEW}


@pytest.mark.parametrize("cache", fast("dual", of=("none", "prefix", "dual")))
def test_rows_are_counted_alike(full_attention, cache):
    job = work("static", cache=cache, steps=12, block_length=BLOCK)
    counts = []
    for engine in full_attention:
        engine.start_counting()
        answered(engine, job)
        counts.append(engine.counts())
    ours, plain = counts
    assert (ours.rows, ours.pairs) == (plain.rows, plain.pairs)
    # Of a block of 8 in 4 steps, 8 + 6 + 4 + 2 positions are masked when they are read.
    assert ours.head_rows == len(PROMPTS) * (NEW // BLOCK) * 20
    assert plain.head_rows == plain.rows
    assert 0 < ours.forward_seconds < ours.step_seconds
    assert 0 < ours.head_seconds < ours.step_seconds


def test_a_plain_batch_writes_what_each_would_alone(full_attention):
    _, plain = full_attention
    prompts = [random.Random(n).choices(range(254), k=12) for n in range(3)]
    batched = PlainEngine(batch=3, softmax="float32")
    batched.model = plain.model
    for strategy in ("static", "threshold"):
        job = work(strategy, cache="dual", steps=12, block_length=BLOCK)
        alone = plain.generate(prompts, job, lambda: None)
        together = batched.generate(prompts, job, lambda: None)
        assert [a.tokens for a in together] == [a.tokens for a in alone]
    with pytest.raises(Unsupported, match="one length"):
        batched.generate(PROMPTS[:2], job, lambda: None)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (work("factor"), "static and threshold, not factor"),
        (work("static", cache="window"), "none, prefix, dual, not window"),
        (work("threshold", strategy_config={"strict": True}), "threshold's threshold"),
    ],
)
def test_what_the_plain_loop_cannot_do(full_attention, job, message):
    with pytest.raises(Unsupported, match=message):
        full_attention[1].generate(PROMPTS, job, lambda: None)


@pytest.mark.slow  # an engine of its own
@pytest.mark.parametrize("steps", [None, 16, 12])
@pytest.mark.parametrize("strategy", ["static", "threshold"])
def test_block_causal(block_causal, strategy, steps):
    job = work(strategy, steps=steps)
    ours, plain = (answered(engine, job) for engine in block_causal)
    assert [a.tokens for a in ours] == [a.tokens for a in plain]
    for prompt, our, theirs in zip(PROMPTS, ours, plain, strict=True):
        # To read the prompt's whole blocks, and behind each block but the last: these
        # forwards we do without.
        blocks = -(-(len(prompt) + NEW) // BLOCK) - len(prompt) // BLOCK
        extra = (len(prompt) >= BLOCK) + blocks - 1
        assert theirs.forwards == our.forwards + extra
    with pytest.raises(Unsupported, match="no cache policy dual"):
        block_causal[1].generate(PROMPTS, work("static", cache="dual"), lambda: None)
