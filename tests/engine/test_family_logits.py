# SPDX-License-Identifier: Apache-2.0
"""Logits of every family against those of its oracle."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.block_cases import BlockCase
from engine.cases import make_prompt
from engine.families import (
    FULL_ATTENTION,
    REUSES_BLOCKS,
    Serve,
    Served,
    names,
    serving,
)
from engine.harness import Engine
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA, write_random_checkpoint
from reference.network import TinyModel, block_causal, causal_context
from reference.quantised import quantise

from vllm_dlm.model_executor.cpu_quantised import onednn_is_exact


@pytest.fixture(scope="module")
def serve(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Serve:
    return serving(engines, tmp_path_factory.getbasetemp() / "families")


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
def test_logits(serve: Serve, served: Served):
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
    differ by less than 0.15 of their norm, and tokens only where two are close. Where
    they overflow, the start is refused.
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
    if not (torch.cpu._is_amx_tile_supported() or onednn_is_exact()):
        with pytest.raises(ValueError, match="overflow on this CPU.*fp8"):
            engines(model=str(folder), dtype="bfloat16")
        return
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
