# SPDX-License-Identifier: Apache-2.0
"""Every family against its oracle: logits, and whole generations token for token."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import block_cases
from engine.block_cases import BlockCase
from engine.cases import (
    Case,
    assert_equal,
    assert_same_tokens,
    expect,
    make_prompt,
    run_cases,
)
from engine.harness import Engine, finished
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA, write_random_checkpoint
from reference.network import TinyModel, block_causal, causal_context
from reference.quantised import quantise


@dataclass(frozen=True)
class Served:
    """One checkpoint and how it is served."""

    family: str
    folder: str
    """Its name says what the released repository's name says."""
    block: int
    """Block length that is served: the family's own, unless `dlm` sets it."""
    shift: int = 0
    dlm: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Entries of config.json."""


BLOCK_CAUSAL = (
    Served("sdar", "SDAR-4B-Chat", 4),
    Served("sdar", "SDAR-4B-Chat-b16", 16, changes={"head_dim": 64}),
    Served("sdar_moe", "SDAR-30B-A3B-Chat-b8", 8),
    Served("llada2", "LLaDA2.0-mini", 32),
    Served("llada2", "LLaDA2.1-mini", 16, dlm={"block_length": 16}),
    Served("fast_dllm_v2", "Fast_dLLM_v2_7B", 32, shift=1),
    Served(
        "fast_dllm_v2",
        "Fast_dLLM_v2_1.5B",
        16,
        shift=1,
        dlm={"block_length": 16},
        changes={"tie_word_embeddings": True, "head_dim": 128},
    ),
    Served("a2d_qwen3", "Qwen3-0.6B-diffusion-bd3lm-v0.1", 32),
    Served(
        "a2d_qwen2",
        "Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
        8,
        dlm={"block_length": 8},
    ),
)
CAUSAL_CONTEXT = (
    Served("nemotron", "Nemotron-Labs-Diffusion-3B", 32),
    Served(
        "nemotron",
        "Nemotron-Labs-Diffusion-8B",
        8,
        changes={"block_size": 8, "head_dim": 64},
    ),
)
REUSES_BLOCKS = BLOCK_CAUSAL + CAUSAL_CONTEXT
FULL_ATTENTION = (
    Served("llada_moe", "LLaDA-MoE-7B-A1B-Instruct", 32),
    Served("dream", "Dream-v0-Instruct-7B", 32, shift=1),
    Served("a2d_qwen3", "Qwen3-0.6B-diffusion-mdlm-v0.1", 32),
    Served("a2d_llama", "Llama-diffusion-mdlm-v0.1", 32),
)


EACH_KIND = (
    "SDAR-4B-Chat",
    "Fast_dLLM_v2_7B",
    "Qwen3-0.6B-diffusion-bd3lm-v0.1",
    "Nemotron-Labs-Diffusion-3B",
)
"""Blocks from position 0, with a shift, from the prompt's end, in a causal context."""


def names(served: tuple[Served, ...]) -> list[str]:
    return [one.folder for one in served]


def others_slow(served: tuple[Served, ...]) -> list[Any]:
    """Those of `EACH_KIND` as they are, the others marked slow."""
    slow = pytest.mark.slow
    return [
        one if one.folder in EACH_KIND else pytest.param(one, marks=slow)
        for one in served
    ]


@pytest.fixture(scope="session")
def serve(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Engine, TinyModel]]:
    """`serve(served, **options)`: its engine and its oracle, made once."""
    folders: dict[str, Path] = {}

    def start(served: Served, **options: Any) -> tuple[Engine, TinyModel]:
        if served.folder not in folders:
            folder = tmp_path_factory.mktemp("model") / served.folder
            folders[served.folder] = write_checkpoint(
                served.family, folder, seed=2, **served.changes
            )
        folder = folders[served.folder]
        engine = engines(served.dlm, model=str(folder), **options)
        return engine, TinyModel.from_folder(folder)

    return start


@contextmanager
def first_logits(engine: Engine):
    """The logits of the first forward that has any, as the sampler gets them."""
    seen: list[torch.Tensor] = []

    def note(module, args, kwargs, output) -> None:
        if output.shape[0]:
            seen.append(output.clone())

    hook = engine.runner.model.logits_processor.register_forward_hook(
        note, with_kwargs=True
    )
    yield seen
    hook.remove()


def first_block(
    engine: Engine, oracle: TinyModel | TinyLLaDA, case: BlockCase, block: int, shift=0
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
    """A request's first active block: forward for forward, the engine's logits and the
    oracle's; then the request's tokens.

    Rows are those of masks that are decided together, first.
    """
    model = engine.scheduler.dlm_defaults
    prompt = list(case.prompt)
    with first_logits(engine) as seen:
        tokens = engine.run([prompt], case.params())[0].tokens
    if model.attention == "full":
        start, end, visible = len(prompt), len(prompt) + block, {}
    else:
        origin = len(prompt) % block if model.block_origin == "prompt" else 0
        start = origin + (len(prompt) - origin) // block * block
        end = start + block
        visible = {"visible": block_causal(end, block, origin)}
        if model.attention == "causal":
            visible = {"visible": causal_context(end, start)}
    row = prompt + [oracle.mask_id] * (end - len(prompt))
    pairs = []
    if model.leads_blocks and start == len(prompt):
        # The forward before has read the prompt and written one token.
        seed = oracle.forward(prompt, visible=causal_context(start, start))[-1:]
        pairs.append((unbanned(seen[0][:1], oracle), unbanned(seed, oracle)))
        row[start] = tokens[0]
    # From the first mask on, as far as masks are decided together.
    first = max(start, len(prompt)) + len(pairs)
    part = engine.runner.model_state.facts.default_config.sub_block_length
    last = min(end, start + ((first - start) // part + 1) * part)
    wanted = oracle.forward(row, **visible)[first - shift : last - shift]
    got = seen[len(pairs)]
    return [*pairs, (unbanned(got, oracle), unbanned(wanted, oracle))], tokens


@pytest.mark.parametrize(
    "served", REUSES_BLOCKS + FULL_ATTENTION, ids=names(REUSES_BLOCKS + FULL_ATTENTION)
)
def test_logits(serve: Callable, served: Served):
    """Logits that a request's first active block reads, of a prompt that shares it."""
    engine, oracle = serve(served)
    case = BlockCase(make_prompt(2 * served.block + 3), served.block)
    pairs, tokens = first_block(engine, oracle, case, served.block, served.shift)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    if len(pairs) == 2:
        assert tokens[0] == pairs[0][1].argmax()


# Names of each family's own; what is left is named as a whole and by a pattern.
# LLaDA2's experts are left, which a CPU's int8 kernels do not know, and all of them are
# chosen, so that rounding cannot choose others.
INT8 = (
    (
        Served("llada", "LLaDA-8B-int8", 32),
        r"0\.attn_out|1\.ff_out|former\.ff_out|wte",
        [
            "model.transformer.blocks.0.attn_out",
            r"re:.*\.blocks\.1\.ff_out$",
            "model.transformer.ff_out",
        ],
    ),
    (
        Served("nemotron", "Nemotron-int8", 32),
        r"0\.self_attn\.o_proj|1\.mlp\.down_proj|diffusion_head|embed_tokens",
        [
            "encoder.layers.0.self_attn.o_proj",
            r"re:encoder\.layers\.1\.mlp\.down_proj$",
            "diffusion_head",
        ],
    ),
    (
        Served("sdar", "SDAR-4B-Chat-b16-int8", 16),
        r"0\.self_attn\.o_proj|1\.mlp\.down_proj|lm_head|embed_tokens",
        ["model.layers.0.self_attn.o_proj", r"re:.*\.1\.mlp\.down_proj$", "lm_head"],
    ),
    (
        Served(
            "llada2",
            "LLaDA2.0-mini-int8",
            32,
            changes={"num_experts_per_tok": 16, "topk_group": 4},
        ),
        r"0\.attention\.dense|\.experts\.\d+\.\w+|mlp\.gate|lm_head|word_embeddings",
        [
            "model.layers.0.attention.dense",
            r"re:.*\.mlp\.(experts|gate)\..*",
            "lm_head",
        ],
    ),
)


@pytest.mark.parametrize(
    ("served", "left", "ignore"), INT8, ids=[served.family for served, *_ in INT8]
)
def test_partly_quantised(
    engines: Callable, tmp_path: Path, served: Served, left: str, ignore: list[str]
):
    """Int8, but for some layers, against the same weights as floats in the oracle.

    Int8 kernels round activations to 8 bits too, and what is left is bfloat16: logits
    differ by less than 0.15 of their norm, and tokens only where two are close.
    """
    folder, Oracle = tmp_path / served.folder, TinyModel
    if served.family == "llada":
        write_random_checkpoint(folder, seed=2)
        Oracle = TinyLLaDA
    else:
        write_checkpoint(served.family, folder, seed=2, **served.changes)
    is_left = re.compile(rf"({left})$").search
    weights = quantise(folder, lambda name: bool(is_left(name)), ignore)
    config = json.loads((folder / "config.json").read_text())
    engine = engines(model=str(folder), dtype="bfloat16")
    case = BlockCase(
        make_prompt(3 * served.block),
        served.block,
        rule="static",
        steps_per_block=1,
        ignore_eos=True,
    )
    pairs, tokens = first_block(engine, Oracle(config, weights), case, served.block)
    got, wanted = (torch.cat(of_forwards) for of_forwards in zip(*pairs, strict=True))
    banned = wanted[0] == -1e3
    got, wanted = got[:, ~banned].float(), wanted[:, ~banned]
    error = (got - wanted).norm() / wanted.norm()
    assert error < 0.15
    best, second = wanted.topk(2).values.T
    sure = best - second > 0.4 * wanted.std()
    ids = (~banned).nonzero().flatten()[wanted.argmax(1)]
    assert sure.sum() > 4
    assert torch.tensor(tokens)[sure].tolist() == ids[sure].tolist()


def unbanned(logits: torch.Tensor, oracle: Any) -> torch.Tensor:
    """Without the column of the mask id, which the engine bans in place."""
    logits = logits[:, : oracle.config["vocab_size"]].clone()
    logits[:, oracle.mask_id] = -1e3
    return logits


def block_sample(served: Served) -> list[BlockCase]:
    """Every residue of the prompt's length mod B; texts that end inside a block."""
    source = random.Random(served.folder)
    block = served.block
    lengths = [*range(1, block + 1), *range(2 * block, 3 * block)][: 2 * block]
    rules = itertools.cycle(block_cases.RULES)
    cases = []
    for number, length in enumerate(lengths):
        cases.append(
            BlockCase(
                make_prompt(length, seed=number),
                max_tokens=source.randint(1, 2 * block + 3),
                rule=next(rules),
                steps_per_block=source.choice([None, 3, block // 2]),
                ignore_eos=number % 3 == 0,
            )
        )
    return cases


@pytest.mark.parametrize("served", REUSES_BLOCKS, ids=names(REUSES_BLOCKS))
def test_block_parity(serve: Callable, served: Served):
    engine, oracle = serve(served)
    cases = block_sample(served)
    wanted = [block_cases.expect(case, oracle, engine) for case in cases]
    assert_equal(cases, block_cases.run(engine, cases), wanted)
    alone = random.Random(0).sample(range(len(cases)), 6)
    got = [block_cases.run(engine, [cases[i]])[0] for i in alone]
    assert_equal([cases[i] for i in alone], got, [wanted[i] for i in alone])


@pytest.mark.parametrize("served", others_slow(REUSES_BLOCKS), ids=names(REUSES_BLOCKS))
def test_in_chunks_and_few_pages(serve: Callable, served: Served):
    """Prompts of several forwards; requests that lose their pages and start over."""
    engine, oracle = serve(
        served, max_num_batched_tokens=64, num_gpu_blocks_override=13
    )
    cases = [
        BlockCase(make_prompt(length), max_tokens=80, rule=rule, ignore_eos=True)
        for length, rule in zip(
            (9, 64, 71, 95, 96, 100, 130, 150), itertools.cycle(block_cases.RULES)
        )
    ]
    wanted = [block_cases.expect(case, oracle, engine) for case in cases]
    alone = [block_cases.run(engine, [case])[0] for case in cases]
    assert_equal(cases, alone, wanted)

    outputs, _ = engine.run_short_of_pages(
        [case.prompt for case in cases], [case.params() for case in cases]
    )
    assert_same_tokens([output.outputs[0].token_ids for output in outputs], wanted)


@pytest.mark.parametrize("served", REUSES_BLOCKS, ids=names(REUSES_BLOCKS))
def test_shared_prefixes(serve: Callable, served: Served):
    """A prompt, more of its text, and all of it, whose pages are there already."""
    engine, oracle = serve(served)
    first = BlockCase(make_prompt(75, seed=7), max_tokens=70, ignore_eos=True)
    text = [*first.prompt, *block_cases.run(engine, [first])[0].tokens]
    for known, more in ((41, 3), (64, 5), (64, 0), (75, 0), (len(text), 3)):
        prompt = (*text[:known], *make_prompt(more, seed=known))
        case = BlockCase(prompt, max_tokens=40, rule="dynamic")
        output = engine.outputs([prompt], case.params())[0]
        # What a token of a -bd3lm- model sees depends on its prompt's length.
        is_shared = engine.scheduler.dlm_defaults.block_origin == "start"
        is_shared |= served in CAUSAL_CONTEXT
        assert (output.num_cached_tokens > 0) == is_shared
        wanted = block_cases.expect(case, oracle, engine)
        assert_equal([case], [finished(output.outputs[0])], [wanted])


def test_pages_of_a_causal_context(serve: Callable):
    """Pages of prompts and of finished text, which end anywhere in blocks."""
    engine, oracle = serve(CAUSAL_CONTEXT[0])
    page = engine.scheduler.block_size
    first = BlockCase(make_prompt(45, seed=1), max_tokens=96, ignore_eos=True)
    text = [*first.prompt, *block_cases.run(engine, [first])[0].tokens]
    # The last block's KV was never computed with all of its tokens in place.
    shared = (len(text) - 32) // page * page
    # The third prompt is there already, as a whole; but its last row has to predict.
    for known, more, found in (
        (41, 3, 32),
        (64, 3, 64),
        (64, 0, 32),
        (len(text), 3, shared),
    ):
        prompt = (*text[:known], *make_prompt(more, seed=known))
        case = BlockCase(prompt, max_tokens=40, ignore_eos=True)
        output = engine.outputs([prompt], case.params())[0]
        assert output.num_cached_tokens == found
        wanted = block_cases.expect(case, oracle, engine)
        assert_equal([case], [finished(output.outputs[0])], [wanted])


@pytest.mark.parametrize("served", FULL_ATTENTION, ids=names(FULL_ATTENTION))
def test_full_attention_parity(serve: Callable, served: Served):
    engine, oracle = serve(served)
    source = random.Random(served.folder)
    rules = ("static/low_confidence", "threshold", "factor", "static/margin")
    cases = [
        Case(
            make_prompt(source.randint(1, 60), seed=number),
            rule=rule,
            cache=cache,
            block=block,
            max_tokens=source.randint(1, 3 * block),
            ignore_eos=number % 3 == 0,
        )
        for number, (rule, cache, block) in enumerate(
            itertools.product(rules, ("none", "prefix", "dual"), (8, 16))
        )
    ]
    wanted = [expect(case, oracle, shift=served.shift) for case in cases]
    assert_equal(cases, run_cases(engine, cases), wanted)
    alone = source.sample(range(len(cases)), 4)
    got = [run_cases(engine, [cases[i]])[0] for i in alone]
    assert_equal([cases[i] for i in alone], got, [wanted[i] for i in alone])
