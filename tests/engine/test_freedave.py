# SPDX-License-Identifier: Apache-2.0
"""FreeDave on real engines: the text of `static`, in fewer forwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import pytest
from engine.block_engines import assert_only_final_pages_are_published
from engine.cases import make_prompt
from engine.harness import Engine, Finished, finished, params
from engine.test_counts import counting
from reference.checkpoints import write_checkpoint
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_dlm import step_map

LLADA_TINY = files("vllm_dlm") / "assets" / "llada-tiny"


@dataclass(frozen=True)
class Asked:
    """One request, to be decoded by any strategy."""

    prompt: tuple[int, ...]
    max_tokens: int = 40
    drafts: int = 4
    block: int | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    seed: int = 0

    def by(self, strategy: str, **config: Any) -> SamplingParams:
        dlm: dict[str, Any] = {
            "strategy": strategy,
            "strategy_config": config,
            "step_map": True,
        }
        if self.block is not None:
            dlm["block_length"] = self.block
        return params(
            self.max_tokens,
            dlm=dlm,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            seed=self.seed,
            logprobs=1,
        )

    def drafted(self, **config: Any) -> SamplingParams:
        return self.by("freedave", drafts=self.drafts, **config)


def run(
    engine: Engine, asked: Sequence[Asked], by: Callable[[Asked], SamplingParams]
) -> list[Finished]:
    return engine.run([one.prompt for one in asked], [by(one) for one in asked])


def one_by_one(
    engine: Engine, asked: Sequence[Asked], by: Callable[[Asked], SamplingParams]
) -> list[Finished]:
    return [run(engine, [one], by)[0] for one in asked]


def static(one: Asked) -> SamplingParams:
    """One token per step."""
    return one.by("static")


def assert_nothing_is_lost(
    asked: Sequence[Asked], got: Sequence[Finished], wanted: Sequence[Finished]
) -> None:
    """Tokens, their steps and log-probabilities, and no more forwards."""
    for one, result, expected in zip(asked, got, wanted, strict=True):
        assert result.tokens == expected.tokens, one
        ours, theirs = step_map(result.output), step_map(expected.output)
        assert ours.steps == theirs.steps, one
        assert ours.beyond == theirs.beyond, one
        assert not any(ours.edited)
        assert result.forwards <= expected.forwards, one
        for ours, theirs in zip(
            result.output.logprobs, expected.output.logprobs, strict=True
        ):
            assert list(ours) == list(theirs)
            for token in ours:
                assert ours[token].rank == theirs[token].rank
                wanted_value = pytest.approx(theirs[token].logprob, abs=1e-4)
                assert ours[token].logprob == wanted_value


def forwards(results: Sequence[Finished]) -> int:
    return sum(result.forwards for result in results)


def compare(engine: Engine, asked: Sequence[Asked]) -> None:
    """Together, alone, among others: as `static` alone, in fewer forwards."""
    wanted = one_by_one(engine, asked, static)
    together = run(engine, asked, Asked.drafted)
    assert_nothing_is_lost(asked, together, wanted)
    assert forwards(together) < forwards(wanted)
    alone = one_by_one(engine, asked[:3], Asked.drafted)
    assert_nothing_is_lost(asked[:3], alone, wanted[:3])

    others = [one.by("threshold", threshold=0.3) for one in asked]
    solo = [engine.run([o.prompt], p)[0] for o, p in zip(asked, others, strict=True)]
    mixed = engine.run(
        [one.prompt for one in asked for _ in range(2)],
        [
            p
            for one, other in zip(asked, others, strict=True)
            for p in (one.drafted(), other)
        ],
    )
    assert_nothing_is_lost(asked, mixed[::2], wanted)
    assert mixed[1::2] == solo


# -- full attention --------------------------------------------------------------


def full_attention_sample(temperature: float) -> list[Asked]:
    return [
        Asked(
            make_prompt(1 + 11 * number, seed=number),
            max_tokens=20 + 5 * number,
            drafts=(2, 3, 4, 9)[number % 4],
            block=(8, 16, 12, 32)[number % 4],
            ignore_eos=number % 3 != 0,
            temperature=temperature,
            seed=number,
        )
        for number in range(7)
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_full_attention(engine: Engine, temperature: float):
    compare(engine, full_attention_sample(temperature))


def test_one_draft_is_static(engine: Engine):
    asked = [replace(one, drafts=1) for one in full_attention_sample(0.0)]
    wanted = run(engine, asked, static)
    got = run(engine, asked, Asked.drafted)
    assert_nothing_is_lost(asked, got, wanted)
    assert forwards(got) == forwards(wanted)


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_with_a_threshold_it_follows_threshold(engine: Engine, threshold: float):
    asked = full_attention_sample(0.0)
    wanted = run(engine, asked, lambda o: o.by("threshold", threshold=threshold))
    got = run(engine, asked, lambda o: o.drafted(threshold=threshold))
    assert_nothing_is_lost(asked, got, wanted)
    alone = one_by_one(engine, asked, lambda o: o.drafted(threshold=threshold))
    assert_nothing_is_lost(asked, alone, wanted)


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

FAMILIES = {
    "SDAR-4B-Chat": ("sdar", 4, {}),
    "SDAR-30B-A3B-Chat-b8": ("sdar_moe", 8, {}),
    # Blocks are seeded; parts of 8 are decided together.
    "Fast_dLLM_v2_7B": ("fast_dllm_v2", 16, {"bd_size": 16}),
    # Blocks are counted from the prompt's end: a block begins anywhere in a page.
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1": ("a2d_qwen2", 8, {}),
    "Nemotron-Labs-Diffusion-8B": ("nemotron", 8, {"block_size": 8, "head_dim": 64}),
}
"""Folder -> family, block length, entries of config.json."""

Serve = Callable[..., Engine]


@pytest.fixture(scope="module")
def serve(engines: Serve, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`serve(name, **options)`: an engine with a random model of `FAMILIES`."""
    parent = tmp_path_factory.mktemp("freedave")

    def start(name: str, **options: Any) -> Engine:
        family, block, changes = FAMILIES[name]
        if not (parent / name).exists():
            write_checkpoint(family, parent / name, seed=2, **changes)
        dlm = {"block_length": block}
        return engines(dlm, model=str(parent / name), **options)

    return start


def block_sample(name: str) -> list[Asked]:
    """Prompts of every residue mod B; texts that end inside a block."""
    source = random.Random(name)
    _, block, _ = FAMILIES[name]
    return [
        Asked(
            make_prompt(length, seed=length),
            max_tokens=source.randint(block, 4 * block + 3),
            drafts=source.choice([2, 3, 4, 8]),
            ignore_eos=length % 3 != 0,
            temperature=0.7 * (length % 4 == 1),
        )
        for length in range(2 * block, 3 * block)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_block_after_block(serve: Serve, name: str):
    compare(serve(name), block_sample(name))


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
    for known in (64, 97, len(text)):
        asked = Asked(tuple(text[:known]), max_tokens=20)
        output = engine.outputs([asked.prompt], static(asked))[0]
        assert output.num_cached_tokens > 0
        engine.llm.reset_prefix_cache()
        (fresh,) = run(engine, [asked], static)
        assert finished(output.outputs[0]).tokens == fresh.tokens


# -- rows and pages --------------------------------------------------------------


@contextmanager
def branches_of(engine: Engine) -> Iterator[list[int]]:
    """Branches of all requests in each forward, their canvases among them."""
    runner, seen = engine.runner, []
    prepare = runner.model_state.prepare_inputs

    def note(input_batch: Any, req_states: Any) -> Any:
        drafts = input_batch.num_draft_tokens_per_req
        seen.append(input_batch.num_reqs + (0 if drafts is None else int(drafts.sum())))
        return prepare(input_batch, req_states)

    runner.model_state.prepare_inputs = note
    try:
        yield seen
    finally:
        del runner.model_state.prepare_inputs


def test_rows_of_every_forward(serve: Serve):
    """Every branch costs a block's rows, and lm_head sees those of its masks."""
    engine = serve("SDAR-4B-Chat")
    asked = Asked(make_prompt(16), max_tokens=12, drafts=3)
    engine.llm.reset_prefix_cache()
    with counting(engine) as counts, branches_of(engine) as branches:
        (result,) = run(engine, [asked], Asked.drafted)
    assert result.forwards == len(counts.rows) == len(branches)
    first = [i for i, count in enumerate(branches) if count == 1 and i]
    assert counts.rows[0] == 16 + 4  # the prompt and the block
    for number, (rows, count) in enumerate(zip(counts.rows, branches, strict=True)):
        # A first forward computes the block before as well, for good.
        assert rows in ((4 * count,) if count > 1 else (4, 8, 20)), number
        assert counts.logits_rows[number] % count == 0
        assert counts.logits_rows[number] <= 4 * count
    assert len(first) >= 2 and max(branches) == 3


def test_drafts_take_no_rows_from_others(busy_engine: Engine):
    """Two requests of 60 rows leave 8 of 128; one alone leaves room for a draft."""
    asked = Asked(make_prompt(28), max_tokens=32, block=32)
    other = replace(asked, prompt=make_prompt(28, seed=1))
    wanted = run(busy_engine, [asked, other], static)
    with branches_of(busy_engine) as branches:
        got = busy_engine.run(
            [asked.prompt, other.prompt], [asked.drafted(), static(other)]
        )
    assert set(branches) == {2}
    assert [one.forwards for one in got] == [one.forwards for one in wanted]
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    with branches_of(busy_engine) as branches:
        alone = run(busy_engine, [asked], Asked.drafted)
    assert set(branches) == {1, 2}
    assert_nothing_is_lost([asked], alone, wanted[:1])
    assert alone[0].forwards < wanted[0].forwards


def test_drafts_fit_into_the_context(small_engine: Engine):
    """Pages of 32, a context of 128: a request of 3 pages has none for drafts."""
    for prompt, most in ((30, 2), (70, 1)):
        asked = Asked(make_prompt(prompt), max_tokens=24, block=12)
        wanted = run(small_engine, [asked], static)
        with branches_of(small_engine) as branches:
            got = run(small_engine, [asked], Asked.drafted)
        assert max(branches) == most
        assert_nothing_is_lost([asked], got, wanted)


def run_short_of_pages(engine: Engine, asked: Sequence[Asked]) -> list[Finished]:
    """What requests finish with, of which some lose their pages on the way."""
    outputs, _ = engine.run_short_of_pages(
        [one.prompt for one in asked], [one.drafted() for one in asked]
    )
    return [finished(output.outputs[0]) for output in outputs]


def assert_same_texts_and_steps(
    got: Sequence[Finished], wanted: Sequence[Finished]
) -> None:
    """But for forwards, of which those that were preempted have had more."""
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.tokens == theirs.tokens
        assert step_map(ours.output).steps == step_map(theirs.output).steps
        assert step_map(ours.output).beyond == step_map(theirs.output).beyond


def test_few_pages_in_full_attention(small_engine: Engine):
    asked = [
        Asked(make_prompt(5 * n, seed=n), max_tokens=90, block=16, drafts=8)
        for n in range(1, 7)
    ]
    wanted = one_by_one(small_engine, asked, static)
    free = small_engine.free_pages
    assert_same_texts_and_steps(run_short_of_pages(small_engine, asked), wanted)
    small_engine.flush()
    assert small_engine.free_pages == free


@pytest.mark.parametrize("name", ["SDAR-4B-Chat", "Fast_dLLM_v2_7B"])
def test_few_pages_block_after_block(serve: Serve, name: str):
    engine = serve(name, num_gpu_blocks_override=13, max_num_batched_tokens=64)
    asked = [
        Asked(make_prompt(length, seed=length), max_tokens=80, drafts=8)
        for length in (9, 64, 71, 95, 96, 100, 130, 150)
    ]
    wanted = one_by_one(engine, asked, static)
    assert_same_texts_and_steps(run_short_of_pages(engine, asked), wanted)


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


def test_approximate_caches_are_refused(engine: Engine):
    sampling = Asked((1, 2)).by("freedave")
    sampling.extra_args["dlm"]["cache"] = "dual"
    with pytest.raises(VLLMValidationError, match="leave cache at 'none'"):
        engine.run([[1, 2]], sampling)
