# SPDX-License-Identifier: Apache-2.0
"""Adapters beside each other: the oracle's texts with each merged into the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import block_cases
from engine.block_cases import BlockCase
from engine.cases import Case, assert_equal, expect, make_prompt
from engine.families import (
    FULL_ATTENTION,
    REUSES_BLOCKS,
    Served,
    names,
    serving,
)
from engine.harness import Engine, Finished, finished
from reference.adapters import is_in_layers, merged, write_adapter, write_merged
from reference.llada import TinyLLaDA
from reference.network import TinyModel
from vllm.lora.request import LoRARequest

from vllm_dlm.training.learner import load_learner

LORA = {"enable_lora": True, "max_loras": 2, "max_cpu_loras": 4, "max_lora_rank": 8}
RULES = ("threshold", "static/low_confidence", "factor", "entropy")
CASES = [
    Case(make_prompt(length, length), rule, cache, 16, max_tokens=40)
    for length, rule, cache in zip(
        (1, 9, 20, 33), RULES, ("none", "none", "dual", "prefix"), strict=True
    )
]


class Adapters:
    """Adapters of a checkpoint, by number; 0 is none."""

    def __init__(self, base: Path, folder: Path, count: int = 3) -> None:
        self.base = base
        self.folders = {n: folder / f"adapter-{n}" for n in range(1, count + 1)}
        for number, one in self.folders.items():
            write_adapter(one, base, seed=number, rank=2 * number)
        self.config = json.loads((base / "config.json").read_text())

    def request(self, number: int) -> LoRARequest | None:
        if number == 0:
            return None
        return LoRARequest(f"adapter-{number}", number, str(self.folders[number]))

    def oracle(self, number: int, kind: type = TinyLLaDA) -> Any:
        if number == 0:
            return kind.from_folder(self.base)
        return kind(self.config, merged(self.base, self.folders[number]))


def run(
    engine: Engine, cases: Sequence[Any], adapters: Sequence[LoRARequest | None]
) -> list[Finished]:
    outputs = engine.llm.generate(
        [{"prompt_token_ids": list(case.prompt)} for case in cases],
        [case.params() for case in cases],
        lora_request=list(adapters),
        use_tqdm=False,
    )
    return [finished(output.outputs[0]) for output in outputs]


@pytest.fixture(scope="module")
def adapters(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(checkpoint, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def lora_engine(engines: Callable[..., Engine]) -> Engine:
    return engines(**LORA)


def test_each_request_gets_its_own(lora_engine: Engine, adapters: Adapters):
    """None and three adapters in one queue, where two fit into a forward; and alone."""
    numbers = [0, 1, 2, 3, 2, 0, 3, 1]
    cases = [CASES[i // 2] for i in range(len(numbers))]
    oracles = [adapters.oracle(number) for number in range(4)]
    wanted = [
        expect(case, oracles[number])
        for case, number in zip(cases, numbers, strict=True)
    ]
    pairs = zip(wanted[::2], wanted[1::2], strict=True)
    assert all(one.tokens != other.tokens for one, other in pairs)
    requests = [adapters.request(number) for number in numbers]
    assert_equal(cases, run(lora_engine, cases, requests), wanted)
    for i in range(0, 8, 5):
        got = run(lora_engine, [cases[i]], [requests[i]])
        assert_equal([cases[i]], got, [wanted[i]])


@pytest.mark.slow
def test_a_compiled_network(engines: Callable[..., Engine], adapters: Adapters):
    """One compilation for batches with adapters and without."""
    engine = engines(**LORA, enforce_eager=False)
    for numbers in ((0, 0, 0, 0), (1, 0, 2, 0), (2, 2, 1, 1)):
        wanted = [
            expect(case, adapters.oracle(number))
            for case, number in zip(CASES, numbers, strict=True)
        ]
        requests = [adapters.request(number) for number in numbers]
        assert_equal(CASES, run(engine, CASES, requests), wanted)


def test_what_a_training_writes(
    lora_engine: Engine, adapters: Adapters, tmp_path: Path
):
    learner = load_learner(adapters.base, lora_rank=3, lora_alpha=6)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in learner.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    learner.save_adapter(tmp_path)
    wanted = expect(
        CASES[1], TinyLLaDA(adapters.config, merged(adapters.base, tmp_path))
    )
    assert wanted.tokens != expect(CASES[1], adapters.oracle(0)).tokens
    request = LoRARequest("trained", 8, str(tmp_path))
    assert_equal(CASES[1:2], run(lora_engine, CASES[1:2], [request]), [wanted])


def test_new_weights_below_adapters(
    lora_engine: Engine, adapters: Adapters, tmp_path: Path
):
    """The base becomes what an adapter made of it; the other is added to that."""
    new = write_merged(tmp_path / "merged", adapters.base, adapters.folders[1])
    llm = lora_engine.llm

    def load(folder: Path) -> None:
        llm.init_weight_transfer_engine({"init_info": {}})
        llm.start_weight_update()
        llm.update_weights({"update_info": {"path": str(folder)}})
        llm.finish_weight_update()

    oracles = [
        TinyLLaDA.from_folder(new),
        TinyLLaDA(adapters.config, merged(new, adapters.folders[2])),
    ]
    requests = [None, adapters.request(2)]
    load(new)
    try:
        wanted = [expect(CASES[0], one) for one in oracles]
        assert_equal(CASES[:1] * 2, run(lora_engine, CASES[:1] * 2, requests), wanted)
    finally:
        load(adapters.base)


REFUSED = {
    # id: (which tensors it has, what it says)
    "of the head": (lambda name: name == "model.transformer.ff_out.weight", "lm_head"),
    "of the embedding": (lambda name: "wte" in name, "embed_tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_has_no_place(
    lora_engine: Engine, checkpoint: Path, tmp_path: Path, name: str
):
    has, said = REFUSED[name]
    write_adapter(
        tmp_path, checkpoint, seed=1, has=lambda one: has(one) or is_in_layers(one)
    )
    with pytest.raises(ValueError, match=said):
        lora_engine.llm.llm_engine.add_lora(LoRARequest("x", 9, str(tmp_path)))


def test_an_adapter_of_other_names(
    lora_engine: Engine, checkpoint: Path, tmp_path: Path
):
    """Of another network with matrices called alike, which vLLM would leave out."""
    write_adapter(tmp_path, checkpoint, seed=1)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"blocks.1.", b"blocks.7."))
    with pytest.raises(ValueError, match=r"model\.layers\.7\.mlp.*7 in all.*no place"):
        lora_engine.llm.llm_engine.add_lora(LoRARequest("x", 9, str(tmp_path)))


def test_prefixes_are_not_shared(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
):
    """Neither by adapters, nor by an adapter and what its folder held before."""
    served = next(one for one in REUSES_BLOCKS if one.folder == "SDAR-4B-Chat-b16")
    base = tmp_path_factory.getbasetemp() / "families"
    engine, _ = serving(engines, base)(served, **LORA)
    adapters = Adapters(base / served.folder, tmp_path_factory.mktemp("shared"), 2)
    case = BlockCase(make_prompt(75, seed=7), max_tokens=40)

    def text(number: int, adapter: LoRARequest | None, cached: int) -> None:
        (output,) = engine.llm.generate(
            {"prompt_token_ids": list(case.prompt)},
            case.params(),
            lora_request=adapter,
            use_tqdm=False,
        )
        assert output.num_cached_tokens == cached
        oracle = adapters.oracle(number, TinyModel)
        wanted = block_cases.expect(case, oracle, engine)
        assert wanted.tokens == list(output.outputs[0].token_ids)

    for cached in (0, 64):
        for number in range(3):
            text(number, adapters.request(number), cached)
    folder = adapters.folders[1]
    write_adapter(folder, adapters.base, seed=8)
    for cached in (0, 64):
        text(1, LoRARequest("adapter-1", 5, str(folder)), cached)
    text(2, adapters.request(2), 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "served", FULL_ATTENTION + REUSES_BLOCKS, ids=names(FULL_ATTENTION + REUSES_BLOCKS)
)
def test_every_family(
    engines: Callable[..., Engine],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    served: Served,
):
    """Under the names of its own checkpoints; experts and routers are refused."""
    base = tmp_path_factory.getbasetemp() / "families"
    engine, _ = serving(engines, base)(served, **LORA)
    adapters = Adapters(base / served.folder, tmp_path, 2)
    numbers = [0, 1, 2] * 2
    cases: list[Any]
    if served in FULL_ATTENTION:
        cases = [
            Case(make_prompt(5 + i), "threshold", "none", served.block, max_tokens=40)
            for i in range(6)
        ]
        wanted = [
            expect(case, adapters.oracle(n, TinyModel), shift=served.shift)
            for case, n in zip(cases, numbers, strict=True)
        ]
    else:
        cases = [BlockCase(make_prompt(5 + i), max_tokens=40) for i in range(6)]
        wanted = [
            block_cases.expect(case, adapters.oracle(n, TinyModel), engine)
            for case, n in zip(cases, numbers, strict=True)
        ]
    requests = [adapters.request(number) for number in numbers]
    assert_equal(cases, run(engine, cases, requests), wanted)
    if not adapters.config.get("num_experts"):
        return
    for part in (".experts.0.", ".gate.", ".router."):
        folder = tmp_path / part.strip(".")
        if write_adapter(
            folder,
            adapters.base,
            seed=1,
            has=lambda name: part in name,  # noqa: B023
        ):
            with pytest.raises(ValueError, match="no place for them"):
                engine.llm.llm_engine.add_lora(LoRARequest("x", 9, str(folder)))
