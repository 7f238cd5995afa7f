# SPDX-License-Identifier: Apache-2.0
"""What DiffusionGemma's requests take of memory in our engine: bytes, counted.

vLLM's own code computes the logits of all canvases at once. Ours has a tile of them at
a time, and keeps of each request what is as wide as an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine.harness import Engine, params
from reference.llada import write_tokenizer
from vllm.sampling_params import StructuredOutputsParams

from vllm_dlm.bench.engine import Costs
from vllm_dlm.bench.gemma_checkpoint import write_gemma
from vllm_dlm.bench.shapes import Shape
from vllm_dlm.bench.step_costs import StepCosts, held_tensors

CANVAS, VOCABULARY, WIDTH, TILE = 16, 5003, 64, 24
FEW, MANY = 8, 32
FLOAT, INT = 4, 8


@pytest.fixture(scope="module")
def engine(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    shape = Shape(
        WIDTH, layers=2, heads=2, kv_heads=2, mlp=96, vocabulary=VOCABULARY, head_dim=32
    )
    folder = tmp_path_factory.mktemp("gemma")
    write_gemma(folder, shape, canvas_length=CANVAS, seed=0)
    words = {"vocab_size": VOCABULARY, "mask_token_id": 124, "eos_token_id": 1}
    write_tokenizer(folder, **words, max_length=64)
    return engines(
        {"diffusion_gemma": "engine"},
        model=str(folder),
        max_model_len=64,
        max_num_seqs=MANY,
        max_num_batched_tokens=MANY * (CANVAS + 8),
        num_gpu_blocks_override=160,
        weight_transfer_config=None,
    )


def costs(engine: Engine, requests: int, **how: Any) -> tuple[Costs, int, int]:
    """Of a few steps with so many requests; seats of their group, and its bytes."""
    ask = params(CANVAS, temperature=1.0, seed=1, detokenize=False, **how)
    ids = [engine.add([5, 6, 7, number], ask) for number in range(requests)]
    engine.step()
    counted = StepCosts(engine.runner)
    counted.start()
    for _ in range(2):
        engine.step()
    sampler = engine.runner.sampler
    (group,) = {id(one): one for one in sampler.groups._group_of.values()}.values()
    seats, size = len(group.memory["last"]) - 1, group.num_bytes
    found = counted.end()
    for name in ids:
        engine.abort(name)
    engine.flush()
    return found, seats, size


WORDS = StructuredOutputsParams(regex=r"(t\d+)+")


@pytest.mark.parametrize("how", [{"ignore_eos": True}, {"structured_outputs": WORDS}])
def test_memory_of_a_request_is_no_matter_of_the_vocabulary(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
):
    monkeypatch.setitem(vars(engine.runner.sampler.facts), "tile_rows", TILE)
    few, *of_few = costs(engine, FEW, **how)
    many, *of_many = costs(engine, MANY, **how)
    # A canvas: its mixtures; where and how much of them; its best tokens, and since
    # when; and for how long they have been the same.
    own = CANVAS * (WIDTH * FLOAT + 1 + FLOAT + 2 * INT) + INT
    for requests, (seats, size) in ((FEW, of_few), (MANY, of_many)):
        assert (seats, size) == (requests, (requests + 1) * own)
    # With a pattern, what was written is on its way to the host besides.
    besides = many.state_bytes - few.state_bytes - (MANY - FEW) * own
    assert 0 <= besides <= (MANY - FEW) * (own if "structured_outputs" in how else 0)
    held = held_tensors([engine.runner.model_state, engine.runner.sampler])
    wide = [one.shape for one in held if VOCABULARY in one.shape]
    # A pattern has its tokens' classes, whoever it is of.
    assert wide == ([(VOCABULARY,)] if "structured_outputs" in how else [])
    # What a step allocates grows by some numbers for each row, not by its logits.
    logits = CANVAS * VOCABULARY * FLOAT
    more = many.sampling_bytes - few.sampling_bytes
    assert 0 <= more < (MANY - FEW) * logits / 20
    assert few.sampling_bytes >= TILE * VOCABULARY * FLOAT
    assert many.sampling_bytes < MANY * logits / 4
