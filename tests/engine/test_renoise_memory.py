# SPDX-License-Identifier: Apache-2.0
"""What DiffusionGemma's requests take of memory in our engine: bytes, counted.

vLLM's own code computes the logits of all canvases at once. Ours has a tile of them at
a time, and keeps of each request what is as wide as an embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine.harness import Engine, params

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
    return engines(
        {"diffusion_gemma": "engine"},
        model=str(write_gemma(folder, shape, canvas_length=CANVAS, seed=0)),
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=MANY,
        max_num_batched_tokens=MANY * (CANVAS + 8),
        num_gpu_blocks_override=160,
        weight_transfer_config=None,
    )


def costs(engine: Engine, requests: int) -> tuple[Costs, int, int]:
    """Of a few steps with so many requests; seats of their group, and its bytes."""
    ask = params(CANVAS, temperature=1.0, seed=1, ignore_eos=True, detokenize=False)
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


def test_memory_of_a_request_is_no_matter_of_the_vocabulary(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(vars(engine.runner.sampler.facts), "tile_rows", TILE)
    few, *of_few = costs(engine, FEW)
    many, *of_many = costs(engine, MANY)
    # A canvas: its mixtures; where and how much of them; its best tokens, and since
    # when; and for how long they have been the same.
    own = CANVAS * (WIDTH * FLOAT + 1 + FLOAT + 2 * INT) + INT
    for requests, (seats, size) in ((FEW, of_few), (MANY, of_many)):
        assert (seats, size) == (requests, (requests + 1) * own)
    assert many.state_bytes - few.state_bytes == (MANY - FEW) * own
    held = held_tensors([engine.runner.model_state, engine.runner.sampler])
    assert not [one.shape for one in held if VOCABULARY in one.shape]
    # What a step allocates grows by some numbers for each row, not by its logits.
    logits = CANVAS * VOCABULARY * FLOAT
    more = many.sampling_bytes - few.sampling_bytes
    assert 0 <= more < (MANY - FEW) * logits / 20
    assert few.sampling_bytes >= TILE * VOCABULARY * FLOAT
    assert many.sampling_bytes < MANY * logits / 4
