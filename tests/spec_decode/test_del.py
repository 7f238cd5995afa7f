# SPDX-License-Identifier: Apache-2.0
"""DEL on engines: exact texts, and the choices and drafts of an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from spec_decode import joint
from spec_decode.del_reference import Oracle
from spec_decode.harness import (
    MAX_MODEL_LEN,
    TIGHT,
    Engine,
    fade,
    params,
    preemptions,
    ragged_prompts,
    write_llama,
)
from tiers import fast
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm_dlm.config.aliases import resolve
from vllm_dlm.spec_decode.del_exit.proposer import EarlyExit, Round
from vllm_dlm.spec_decode.options import REQUEST_KEY, Del
from vllm_dlm.tasks.problems import sample_problems
from vllm_dlm.tasks.tokenizer import encode_prompt

NUM_LAYERS = 6
STOPS = get_args(Del.model_fields["stop"].annotation)
DEL: dict[str, Any] = {"method": "del"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 layers whose exits often say what the last one says."""
    folder = write_llama(
        tmp_path_factory.mktemp("shallow"), seed=0, num_layers=NUM_LAYERS
    )
    fade(LlamaForCausalLM.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def pair(model: Path, engines: Callable[..., Engine]) -> tuple[Engine, Engine]:
    """Without and with DEL."""
    return engines(model=model), engines(DEL, model=model)


def run(engine: Engine, *args: Any) -> tuple[list[list[int]], list[list[Round]]]:
    """The texts, and each request's rounds, in the order of the requests.

    No page is found in the cache: a cached prompt leaves fewer positions to learn from.
    """
    assert engine.llm.reset_prefix_cache()
    drafter = engine.drafter
    drafter.rounds, drafter.requests = [], {}
    drafter.counts.clear()
    texts = engine.run(*args)
    rounds, drafter.rounds = drafter.rounds, None
    assert not drafter.failed
    ids = sorted({entry.request_id for entry in rounds}, key=_number)
    return texts, [[r for r in rounds if r.request_id == name] for name in ids]


def _number(request_id: str) -> int:
    """Of a request, in the order in which they were made: "12-abcdef" -> 12."""
    return int(request_id.partition("-")[0])


def shape(rounds: list[Round]) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """What a round decides, without its rates."""
    return [(r.num_tokens, r.choice.exit, r.choice.length, r.tokens) for r in rounds]


@pytest.mark.parametrize("count", fast(1, of=(1, 3, 8)))
def test_texts_are_those_of_plain_decoding(pair: tuple[Engine, Engine], count: int):
    plain, engine = pair
    prompts = ragged_prompts(count)
    wanted = plain.run(prompts, params(MAX_MODEL_LEN))
    texts, rounds = run(engine, prompts, params(MAX_MODEL_LEN))
    assert texts == wanted
    assert {len(p) + len(t) for p, t in zip(prompts, texts, strict=True)} == {
        MAX_MODEL_LEN
    }
    # Far fewer verifications than tokens, and layers are counted exactly.
    assert sum(map(len, rounds)) < 0.75 * sum(map(len, texts))
    every = [entry for request in rounds for entry in request]
    counts = engine.drafter.counts
    assert counts["rows"] == sum(len(r.tokens) for r in every)
    assert counts["layer_rows"] == sum(len(r.tokens) * r.choice.exit for r in every)
    assert len({r.choice.exit for r in every}) > 1


def test_the_cache_holds_the_layers_of_the_target_only(pair: tuple[Engine, Engine]):
    groups = [engine.runner.kv_cache_config.kv_cache_groups for engine in pair]
    assert groups[0] == groups[1]
    assert sum(len(group.layer_names) for group in groups[1]) == NUM_LAYERS


@pytest.fixture
def stop(pair: tuple[Engine, Engine], request: pytest.FixtureRequest) -> Iterator[str]:
    """Another rule for the engine with DEL; the worker reads it in each round."""
    drafter = pair[1].drafter
    own = drafter.options
    drafter.options = own.model_copy(update={"stop": request.param})
    yield request.param
    drafter.options = own


@pytest.mark.parametrize(
    ("stop", "prompt", "length"),
    fast(
        ("confidence", 1, 12),
        of=[
            ("confidence", 1, 12),
            *(("confidence", prompt, 60) for prompt in (0, 1, 5)),
            # From a prompt of 40 tokens, to the end of the context.
            *((stop, 2, 39) for stop in STOPS),
        ],
    ),
    indirect=["stop"],
)
def test_choices_and_drafts_are_the_oracles(
    model: Path, pair: tuple[Engine, Engine], stop: str, prompt: int, length: int
):
    tokens = ragged_prompts(8)[prompt]
    texts, [rounds] = run(pair[1], [tokens], params(length))
    oracle = Oracle(model, [1, 2, 3, 4, 5], NUM_LAYERS, stop)
    assert shape(rounds) == oracle.rounds(tokens, length)
    assert texts == pair[0].run([tokens], params(length))


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS, indirect=True)
def test_texts_of_a_batch_with_each_rule(pair: tuple[Engine, Engine], stop: str):
    prompts = ragged_prompts(4)
    texts, rounds = run(pair[1], prompts, params(60))
    assert texts == pair[0].run(prompts, params(60))
    every = [entry for request in rounds for entry in request]
    beyond = [r for r in every if len(r.tokens) > r.choice.length]
    assert bool(beyond) == (stop in ("confidence", "gain"))
    assert all(len(r.tokens) <= r.choice.most for r in every)


@pytest.mark.parametrize(("count", "length"), fast((3, 10), of=((3, 10), (8, 40))))
def test_neighbours_change_nothing(
    pair: tuple[Engine, Engine], count: int, length: int
):
    prompts, asked = ragged_prompts(count), params(length)
    _, together = run(pair[1], prompts, asked)
    alone = [run(pair[1], [prompt], asked)[1][0] for prompt in prompts]
    assert [shape(rounds) for rounds in together] == [shape(r) for r in alone]


@pytest.fixture
def tight(model: Path, engines: Callable[..., Engine]) -> Engine:
    return engines(DEL, model=model, **TIGHT)


@pytest.mark.slow
def test_prompts_in_chunks(pair: tuple[Engine, Engine], tight: Engine):
    """The first round's statistics are of the same positions."""
    prompt = ragged_prompts(8)[2]
    assert len(prompt) > 32
    texts, [rounds] = run(tight, [prompt], params(40))
    wanted, [whole] = run(pair[1], [prompt], params(40))
    assert texts == wanted == pair[0].run([prompt], params(40))
    assert shape(rounds) == shape(whole)
    assert rounds[0].acceptance == pytest.approx(whole[0].acceptance, rel=1e-9)


def test_cached_prompts(pair: tuple[Engine, Engine]):
    plain, engine = pair
    prompts = [[7] * 33 + prompt for prompt in ragged_prompts(4)]
    wanted = plain.run(prompts, params(30))
    engine.run(prompts, params(1))
    results = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params(30), use_tqdm=False
    )
    assert [list(result.outputs[0].token_ids) for result in results] == wanted
    assert all(result.num_cached_tokens >= 32 for result in results)


@pytest.mark.slow
def test_requests_that_are_preempted(pair: tuple[Engine, Engine], tight: Engine):
    """Their text is computed anew in chunks, without drafts on missing keys."""
    prompts = ragged_prompts(8)
    with preemptions(tight) as preempted:
        texts, rounds = run(tight, prompts, params(80))
    assert preempted
    assert texts == pair[0].run(prompts, params(80))
    for request in rounds:
        at = [r.num_tokens for r in request]
        assert at == sorted(set(at))


@pytest.mark.slow
def test_rounds_without_drafts_go_on_learning(
    plain: Engine, target: Path, engines: Callable[..., Engine]
):
    """A random model whose exits say little: no draft pays, until one may."""
    engine = engines(DEL, model=target)
    prompts = ragged_prompts(8)
    texts, rounds = run(engine, prompts, params(100))
    assert texts == plain.run(prompts, params(100))
    lengths = [r.choice.length for request in rounds for r in request]
    assert lengths.count(0) > len(lengths) / 2
    assert any(
        before.choice.length == 0 and after.choice.length > 0
        for request in rounds
        for before, after in zip(request, request[1:], strict=False)
    )
    for request in rounds:
        rates = [r.acceptance for r in request]
        assert len(set(rates)) > 1


def test_a_request_without_drafts_is_left_alone(pair: tuple[Engine, Engine]):
    plain, engine = pair
    prompts = ragged_prompts(3)
    off = params(20, extra_args={REQUEST_KEY: 0})
    texts, rounds = run(engine, prompts, [off, params(20), off])
    assert texts == plain.run(prompts, params(20))
    _, alone = run(engine, prompts[1:2], params(20))
    assert [shape(r) for r in rounds] == [shape(r) for r in alone]
    run(engine, prompts, off)
    assert not engine.drafter.counts


@pytest.fixture
def shared(model: Path, engines: Callable[..., Engine]) -> Engine:
    own = {"exits": [2, 4], "decay": 1, "num_speculative_tokens": 2}
    engine = engines({**DEL, **own, "statistics": "shared"}, model=model, **TIGHT)
    engine.drafter.shared.counts[:] = 0
    engine.drafter.shared.confidences[:] = 0
    return engine


@pytest.mark.slow
def test_shared_statistics(pair: tuple[Engine, Engine], shared: Engine):
    prompts = ragged_prompts(8)
    texts, rounds = run(shared, prompts, params(60))
    assert texts == pair[0].run(prompts, params(60))
    every = [r for request in rounds for r in request]
    assert {r.choice.exit for r in every} <= {2, 4}
    assert max(len(r.tokens) for r in every) == 2
    # A new request starts with what the others taught.
    _, [alone] = run(shared, prompts[:1], params(3))
    assert alone[0].acceptance[0] == pytest.approx(every[-1].acceptance[0], abs=0.02)


@pytest.mark.slow
def test_each_token_is_counted_once_if_preempted(
    pair: tuple[Engine, Engine], shared: Engine
):
    run(shared, [[5]], params(1))
    [before] = set(shared.drafter.shared.counts.sum(axis=0).tolist())
    prompts = ragged_prompts(8)
    with preemptions(shared) as preempted:
        texts, _ = run(shared, prompts, params(80))
    assert preempted
    assert texts == pair[0].run(prompts, params(80))
    counted = before + sum(map(len, texts))
    assert shared.drafter.shared.counts.sum(axis=0).tolist() == [counted] * 2


@pytest.mark.slow
def test_each_token_is_counted_once(pair: tuple[Engine, Engine], shared: Engine):
    """To the end of the text: what was accepted behind it is not of the text."""
    counted, last = 0, []
    for prompt in ragged_prompts(8):
        [whole] = pair[0].run([prompt], params(60))
        stop = whole[20]
        options = params(60, stop_token_ids=[stop])
        [text], [rounds] = run(shared, [prompt], options)
        assert text == whole[: whole.index(stop) + 1]
        counted += len(text)
        if not last:
            counted += min(32, len(prompt)) - 1
        assert shared.drafter.shared.counts.sum(axis=0).tolist() == [counted] * 2
        assert not any(stop in r.tokens[:-1] for r in rounds)
        last.append(rounds[-1].tokens[-1:] == (stop,))
    # Some ended with a draft that was accepted whole, and a token more behind it.
    assert any(last)


@pytest.mark.slow
def test_the_built_in_model(engines: Callable[..., Engine]):
    """Trained to be read out after each layer: drafts save more than half."""
    model = Path(resolve("llama-tiny"))
    problems = sample_problems(16, seed=0, split="heldout")
    prompts = [encode_prompt(problem.question, chat=False) for problem in problems]
    options = params(64, ignore_eos=False)
    texts, rounds = run(engines(DEL, model=model), prompts, options)
    assert texts == engines(model=model).run(prompts, options)
    assert sum(map(len, rounds)) < 0.5 * sum(map(len, texts))


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [MistralConfig, Qwen2Config, Qwen3Config], ids=lambda kind: kind.__name__
)
def test_other_families(config: Any, tmp_path: Path, engines: Callable[..., Engine]):
    torch.manual_seed(0)
    options = {"head_dim": 32} if config is not Qwen2Config else {}
    network = AutoModelForCausalLM.from_config(config(**SMALL, **options))
    fade(network).save_pretrained(tmp_path)
    engine = engines(DEL, model=tmp_path)
    prompts = ragged_prompts(3)
    texts, rounds = run(engine, prompts, params(30))
    assert texts == engines(model=tmp_path).run(prompts, params(30))
    assert sum(map(len, rounds)) < 0.8 * sum(map(len, texts))


def test_a_model_that_it_does_not_know():
    config = OPTConfig(
        vocab_size=64,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        word_embed_proj_dim=64,
    )
    with pytest.raises(ValueError, match="layers of OPTForCausalLM.*Qwen3ForCausalLM"):
        EarlyExit(AutoModelForCausalLM.from_config(config))


def test_an_exit_that_the_model_does_not_have(model: Path):
    with pytest.raises(ValueError, match="exits are 1 to 5"):
        Engine(model, {**DEL, "exits": [2, 6]})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose whole texts can be counted."""
    folder = write_llama(
        tmp_path_factory.mktemp("small"), 0, vocab_size=joint.VOCAB, num_layers=3
    )
    fade(LlamaForCausalLM.from_pretrained(folder), 0.3).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_sampled_texts_have_the_targets_distribution(
    small: Path,
    engines: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
):
    """Although a draft ends where its own token is improbable."""
    monkeypatch.setattr(joint, "LENGTH", 4)
    engine = engines(
        {**DEL, "num_speculative_tokens": 2, "stop": stop},
        model=small,
        max_num_seqs=256,
    )
    engine.drafter.rounds = []
    observed = joint.counts(engine, joint.PROMPT, joint.SAMPLES)
    lengths = np.bincount([len(r.tokens) for r in engine.drafter.rounds], minlength=3)
    engine.drafter.rounds = None
    assert not engine.drafter.failed and (lengths > 100).sum() >= 2
    exact = joint.probabilities(small, joint.PROMPT, 1.0)
    assert joint.p_value(observed, exact) > joint.PASSES
