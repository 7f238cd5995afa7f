# SPDX-License-Identifier: Apache-2.0
"""FreeDave on real engines: the text of `static`, in fewer forwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from engine.block_engines import assert_only_final_pages_are_published
from engine.cases import make_prompt
from engine.freedave_cases import (
    FAMILIES,
    Asked,
    Serve,
    assert_nothing_is_lost,
    block_sample,
    branches_of,
    compare,
    forwards,
    one_by_one,
    room_in,
    run,
    serving,
    static,
)
from engine.harness import Engine, finished
from reference.checkpoints import write_checkpoint
from reference.freedave_procedures import freedave
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from tiers import fast
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_dlm import step_map

LLADA_TINY = files("vllm_dlm") / "assets" / "llada-tiny"


# -- full attention --------------------------------------------------------------


def full_attention_sample(temperature: float, cache: str = "none") -> list[Asked]:
    return [
        Asked(
            make_prompt(1 + 11 * number, seed=number),
            max_tokens=20 + 5 * number,
            drafts=(2, 3, 4, 9)[number % 4],
            block=(8, 16, 12, 32)[number % 4],
            ignore_eos=number % 3 != 0,
            temperature=temperature,
            seed=number,
            cache=cache,
        )
        for number in range(7)
    ]


CACHES = [
    ("dual", 0.7, 3),
    ("none", 0.0, 1),
    ("none", 0.7, 1),
    ("prefix", 0.7, 1),
    ("dual", 0.0, 1),
    ("dual", 0.7, 1),
]
"""Policies under which steps may share a forward, temperatures, and n: every n-th
request of the sample is tried."""


@pytest.mark.parametrize(("cache", "temperature", "every"), fast(CACHES[0], of=CACHES))
def test_full_attention(engine: Engine, cache: str, temperature: float, every: int):
    compare(engine, full_attention_sample(temperature, cache)[::every])


@pytest.fixture(scope="module")
def dream_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dream") / "Dream-v0-Instruct-7B"
    return write_checkpoint("dream", folder, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize(("exact", "every"), [(True, 1), (False, 1)])
def test_with_a_shift_and_keys_that_stay(
    engines: Serve, dream_folder: Path, exact: bool, every: int
):
    """The row left of the block is computed with it; or the block is opened alone."""
    sample = full_attention_sample(0.0, "dual")[::every]
    compare(
        engines(model=str(dream_folder)), [replace(one, exact=exact) for one in sample]
    )


COUNTED = [*itertools.product((0, 1), ("none", "prefix", "dual"))]


@pytest.mark.parametrize(("shift", "cache"), fast((1, "dual"), of=COUNTED))
def test_forwards_are_those_of_the_rule(
    engines: Serve, checkpoint: Path, dream_folder: Path, cache: str, shift: int
):
    """No draft that is right is lost on the way, and none is verified too early."""
    folder = dream_folder if shift else checkpoint
    model = TinyModel.from_folder(folder) if shift else TinyLLaDA.from_folder(folder)
    engine = engines(model=str(folder)) if shift else engines()
    asked = [
        Asked(
            make_prompt(3 + 17 * number, seed=number),
            max_tokens=48,
            drafts=(4, 3, 8)[number],
            block=(16, 8, 24)[number],
            cache=cache,
        )
        for number in range(2)
    ]
    for one in asked:
        wanted = freedave(
            model,
            list(one.prompt),
            gen_length=one.max_tokens,
            block_length=one.block,
            drafts=one.drafts,
            cache=cache,
            shift=shift,
            room=room_in(engine),
        )
        (got,) = run(engine, [one], Asked.drafted)
        assert (got.tokens, got.forwards) == (wanted.tokens, wanted.forwards), one


@pytest.mark.slow
def test_one_draft_is_static(engine: Engine):
    asked = [replace(one, drafts=1) for one in full_attention_sample(0.0)]
    wanted = run(engine, asked, static)
    got = run(engine, asked, Asked.drafted)
    assert_nothing_is_lost(asked, got, wanted)
    assert forwards(got) == forwards(wanted)


@pytest.mark.parametrize("threshold", fast(0.1, of=(0.05, 0.1, 0.3)))
def test_with_a_threshold_it_follows_threshold(engine: Engine, threshold: float):
    asked = full_attention_sample(0.0)
    wanted = run(engine, asked, lambda o: o.by("threshold", threshold=threshold))
    got = run(engine, asked, lambda o: o.drafted(threshold=threshold))
    assert_nothing_is_lost(asked, got, wanted)
    alone = one_by_one(engine, asked, lambda o: o.drafted(threshold=threshold))
    assert_nothing_is_lost(asked, alone, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_its_map_is_replayed(engine: Engine, temperature: float):
    asked = full_attention_sample(temperature)
    got = run(engine, asked, Asked.drafted)
    replays = []
    for one, result in zip(asked, got, strict=True):
        found = step_map(result.output)
        replays.append(one.by("replay", recorded_steps=found.steps + found.beyond))
    again = engine.run([one.prompt for one in asked], replays)
    assert [one.tokens for one in again] == [one.tokens for one in got]


@pytest.mark.slow
def test_llada_tiny(engines: Callable[..., Engine]):
    """A model that was trained: several tokens in most forwards."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(LLADA_TINY))
    engine = engines(model=str(LLADA_TINY), max_model_len=512)
    asked = [
        Asked(
            tuple(tokenizer.encode(text)),
            max_tokens=64,
            drafts=drafts,
            block=32,
            ignore_eos=False,
        )
        for drafts, text in zip(
            (4, 8, 2, 4),
            ("copy: Ada Ben Cleo", "reverse: 1 2 3 4 5", "Ada", "sort: 9 3 5 1"),
            strict=True,
        )
    ]
    compare(engine, asked)
    wanted = forwards(run(engine, asked, static))
    got = forwards(run(engine, asked, Asked.drafted))
    assert got < 0.7 * wanted, (got, wanted)


# -- block after block -----------------------------------------------------------


@pytest.fixture(scope="module")
def serve(engines: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    return serving(engines, tmp_path_factory.getbasetemp() / "freedave")


@pytest.mark.parametrize(
    "name",
    fast("SDAR-4B-Chat", of=FAMILIES),
)
def test_block_after_block(serve: Serve, name: str):
    compare(serve(name), block_sample(name, (2, 3, 4, 8)))


def test_pages_of_drafts_are_never_found(serve: Serve):
    """Text after a prompt that was decoded with drafts, and shares its pages."""
    engine = serve("SDAR-4B-Chat")
    first = Asked(make_prompt(75, seed=7), max_tokens=70)
    name = engine.add(first.prompt, first.drafted())
    text: list[int] = []
    while engine.busy:
        for output in engine.step():
            assert output.request_id == name
            text = [*first.prompt, *output.outputs[0].token_ids]
        assert_only_final_pages_are_published(engine)
    for known in (64, len(text)):
        asked = Asked(tuple(text[:known]), max_tokens=20)
        output = engine.outputs([asked.prompt], static(asked))[0]
        assert output.num_cached_tokens > 0
        engine.llm.reset_prefix_cache()
        (fresh,) = run(engine, [asked], static)
        assert finished(output.outputs[0]).tokens == fresh.tokens


# -- what looks at every step ----------------------------------------------------


def test_no_drafts_where_every_step_is_looked_at(engine: Engine):
    asked = Asked(make_prompt(9), block=16, ignore_eos=False)

    def watched(strategy: str) -> SamplingParams:
        sampling = asked.by(strategy)
        sampling.extra_args["dlm"] |= {"eotp": "token", "eotp_threshold": 0.05}
        return sampling

    (wanted,) = engine.run([asked.prompt], watched("static"))
    with branches_of(engine) as branches:
        (got,) = engine.run([asked.prompt], watched("freedave"))
    assert set(branches) == {1}
    assert (got.tokens, got.forwards) == (wanted.tokens, wanted.forwards)


@pytest.mark.parametrize("cache", ["vicinity", "window"])
def test_caches_that_count_forwards_are_refused(engine: Engine, cache: str):
    sampling = Asked((1, 2), cache=cache).by("freedave")
    with pytest.raises(VLLMValidationError, match="set cache to 'none' or 'prefix' or"):
        engine.run([[1, 2]], sampling)


def test_eager_is_refused_with_full_attention(engine: Engine):
    with pytest.raises(VLLMValidationError, match="full attention, where a full block"):
        run(engine, [Asked((1, 2), eager=True)], Asked.drafted)
