# SPDX-License-Identifier: Apache-2.0
"""New requests reach the table together, as if each had been written by itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operations import Operations
from tiers import fast

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.columns import (
    NEVER,
    NO_TOKEN,
    STOP_IDS,
    Requests,
    number_columns,
)
from vllm_dlm.model_executor.facts import RequestFacts
from vllm_dlm.model_executor.layout import Limits, lay_out
from vllm_dlm.model_executor.sampling.candidates import Candidates
from vllm_dlm.model_executor.sampling.eotp import MODES
from vllm_dlm.model_executor.sampling.groups import StrategyGroups
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.model_executor.staging import Staging
from vllm_dlm.strategies.base import Context

MASK, VOCAB, LENGTH, SLOTS = 99, 100, 40, 4
CPU = torch.device("cpu")
FULL = ModelDefaults("threshold", 4, MASK)
LEADS = ModelDefaults(
    "threshold", 4, MASK, attention="block", shift=1, block_origin="start"
)
RULES = ["threshold", "static", "slowfast", "klass", "cad", "joint", "freedave"]


class New(NamedTuple):
    """What a request is admitted with."""

    slot: int
    facts: RequestFacts
    known: list[int]


class Engine:
    """The request table, and the parts of the sampler that new requests meet."""

    def __init__(self, model: ModelDefaults) -> None:
        self.slots = RequestSlots(SLOTS, LENGTH, MASK, CPU)
        facts: Any = SimpleNamespace(
            device=CPU,
            defaults=model,
            vocab_size=VOCAB,
            max_model_len=LENGTH,
            context=lambda cache: Context(CPU, "", cache=cache),
        )
        self.groups = StrategyGroups(self.slots, facts)
        self.candidates = Candidates(self.slots, facts)

    def admit(self, new: New) -> None:
        self.slots.admit(new.slot, new.facts, new.known)
        self.groups.add(new.slot)
        self.candidates.add(new.slot)

    def remove(self, slot: int) -> None:
        self.candidates.remove(slot)
        self.groups.remove(slot)
        self.slots.release(slot)

    def tensors(self) -> list[torch.Tensor]:
        table = self.slots
        return [
            table.facts,
            table.facts_f,
            table.stop_ids,
            table.live,
            table.tokens,
            table.masked,
        ]


@st.composite
def requests(draw: st.DrawFn, model: ModelDefaults, slot: int) -> New:
    options: dict[str, Any] = {
        "strategy": draw(st.sampled_from(RULES)),
        "reference_exact": draw(st.booleans()),
        "eotp": draw(st.sampled_from(MODES if model is FULL else MODES[:3])),
        "eotp_threshold": draw(st.floats(0, 1)),
    }
    if options["strategy"] == "threshold":
        options["strategy_config"] = {"threshold": draw(st.floats(0.1, 1))}
    if model is FULL:
        options["cache"] = draw(st.sampled_from(["none", "prefix", "dual"]))
        options["block_length"] = draw(st.integers(1, 8))
        options["growth"] = draw(st.sampled_from(["none", "daedal", "rho_eos"]))
    max_tokens = draw(st.integers(1, 8))
    config = resolve(DlmConfig(**options), None, model).sized(max_tokens, 16)
    prompt_len = draw(st.integers(1, 20))
    known = draw(
        st.lists(
            st.integers(0, VOCAB - 1),
            min_size=prompt_len,
            max_size=prompt_len + max_tokens - 1,
        )
    )
    layout = lay_out(
        config,
        model,
        Limits(16, LENGTH),
        prompt_len=prompt_len,
        num_known=len(known),
        max_tokens=max_tokens,
    )
    params: Any = SimpleNamespace(
        temperature=draw(st.sampled_from([0.0, 0.7])),
        top_p=draw(st.floats(0.1, 1)),
        min_p=draw(st.floats(0, 1)),
        top_k=draw(st.sampled_from([-1, 0, 5, 10**9])),
        min_tokens=0,
        bad_words_token_ids=None,
        allowed_token_ids=None,
        all_stop_token_ids=set(),
        logit_bias=None,
    )
    stop_ids = draw(st.lists(st.integers(-1, VOCAB + 1), max_size=12, unique=True))
    facts = RequestFacts(
        f"{slot}",
        config,
        layout,
        params,
        draw(st.integers(-(2**63), 2**63 - 1)),
        tuple(sorted(stop_ids)),
        measures_drawn=False,
    )
    return New(slot, facts, known)


@st.composite
def batches(draw: st.DrawFn, model: ModelDefaults) -> list[New]:
    slots = draw(st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
    return [draw(requests(model, slot)) for slot in slots]


def check(engine: Engine, new: New) -> None:
    """A slot holds what its request says, read column by column."""
    table, slot, facts = engine.slots, new.slot, new.facts
    config, layout, params = facts.config, facts.layout, facts.params
    strategy = table.strategies[slot]
    numbers = {
        "prompt_len": layout.prompt_len,
        "longest": layout.prompt_len + layout.max_tokens,
        "text_end": layout.text_end,
        "block_length": layout.block_length,
        "sub_block_length": layout.sub_block_length,
        "steps_per_block": layout.steps_per_block,
        "eotp": MODES.index(config.eotp),
        "growth_expansion": layout.growth.expansion,
        "growth_window": layout.growth.window,
        "exact": config.reference_exact,
        "opens_alone": layout.opens_alone,
        "may_rewrite": strategy.may_rewrite,
        "has_branches": config.strategy == "freedave",
        "min_tokens": params.min_tokens,
        "seed": facts.seed,
        "top_k": min(max(params.top_k, 0), VOCAB),
        "block_start": layout.first_block,
        "frontier": layout.first_block,
        "canvas_end": 0 if layout.is_full else layout.text_end,
        "step": layout.first_step,
        "emitted": layout.num_emitted,
        "block_masks": 0,
    }
    got = {name: getattr(table, name)[slot].item() for name in numbers}
    assert got == numbers
    assert table.reach[slot].tolist() == [int(value) for value in layout.reach]
    limit = strategy.step_limit(config.params)
    assert int(table.step_limit[slot]) - limit in (0, 1)
    steps = strategy.reference_steps(config.params, layout.steps_per_block)
    steps = NEVER if steps is None or not config.reference_exact else steps
    assert int(table.reference_steps[slot]) == steps
    floats = {
        "eotp_threshold": config.eotp_threshold,
        "growth_threshold": layout.growth.threshold,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    for name, value in floats.items():
        assert getattr(table, name)[slot] == torch.tensor(value, dtype=torch.float32)
    for name, (is_int, column) in number_columns(type(config.params)).items():
        own = (table.numbers if is_int else table.numbers_f)[slot, column]
        assert own == torch.tensor(getattr(config.params, name), dtype=own.dtype)
    ends = [token for token in facts.stop_ids if 0 <= token < VOCAB]
    first = [token for token in table.stop_ids[slot].tolist() if token != NO_TOKEN]
    assert first == ends[:STOP_IDS]
    first_mask = layout.first_mask
    tokens = new.known[:first_mask] + [MASK] * (LENGTH - first_mask)
    assert table.tokens[slot].tolist() == tokens
    assert table.masked[slot].tolist() == [at >= first_mask for at in range(LENGTH)]


@pytest.mark.parametrize("model", [FULL, LEADS], ids=["full", "leads"])
@given(data=st.data())
def test_staged_together_is_written_one_by_one(model: ModelDefaults, data: Any):
    """Also in slots that others have had."""
    together, alone = Engine(model), Engine(model)
    untouched = {*range(SLOTS + 1)}
    for _ in range(2):
        batch = data.draw(batches(model))
        for slot in [*together.slots.requests]:
            together.remove(slot)
            alone.remove(slot)
        for new in batch:
            together.admit(new)
            alone.admit(new)
            alone.slots.write_staged()
        together.slots.write_staged()
        for new in batch:
            check(together, new)
        for one, other in zip(together.tensors(), alone.tensors(), strict=True):
            assert torch.equal(one, other)
        untouched -= {new.slot for new in batch}
    fresh = Engine(model)
    for slot in untouched:
        for one, other in zip(together.tensors(), fresh.tensors(), strict=True):
            assert torch.equal(one[slot], other[slot])


@pytest.mark.parametrize("model", fast(LEADS, of=(FULL, LEADS)), ids=["full", "leads"])
@given(data=st.data())
def test_stop_ids_in_any_number(model: ModelDefaults, data: Any):
    """Those that the table has no room for end a text, too, of their request alone."""
    engine = Engine(model)
    batch = data.draw(batches(model))
    for new in batch:
        engine.admit(new)
    engine.slots.write_staged()
    slots = torch.tensor([new.slot for new in batch])
    tokens = torch.arange(VOCAB).expand(len(batch), VOCAB)
    blocks: Any = SimpleNamespace(
        slots=slots,
        positions=tokens + LENGTH,
        requests=Requests.of(engine.slots, slots),
    )
    is_stop = engine.candidates.is_stop(tokens, blocks)
    for new, stops in zip(batch, is_stop, strict=True):
        expected = {token for token in new.facts.stop_ids if 0 <= token < VOCAB}
        assert {*stops.nonzero()[:, 0].tolist()} == expected


@given(st.data())
def test_any_number_of_requests_takes_four_operations(data: Any):
    engine = Engine(FULL)
    batch = data.draw(batches(FULL))
    few = [
        new._replace(facts=replace(new.facts, stop_ids=new.facts.stop_ids[:STOP_IDS]))
        for new in batch
        if new.facts.config.strategy in ("threshold", "static", "cad")
    ]
    with Operations() as done:
        for new in few:
            engine.admit(new)
        assert not done.names
        engine.slots.write_staged()
    assert done.names == ["index_copy_"] * 4 * bool(few)
    with Operations() as done:
        engine.slots.write_staged()
    assert not done.names


def test_rows_that_are_staged_anew():
    """Only the last counts, and what is not set is 0."""
    tensors = [
        torch.full((3, 3), 7, dtype=torch.int64),
        torch.full((3, 5), 7, dtype=torch.int32),
        torch.full((3, 5), True),
    ]
    staging = Staging(tensors)
    place = staging.place_of(2)
    staging.arrays[0][place] = -(2**40)
    assert staging.place_of(1) != place == staging.place_of(2)
    staging.arrays[1][place, 1:] = [1, 2, 3, 4]
    staging.write()
    assert tensors[0].tolist() == [[7] * 3, [0] * 3, [-(2**40)] * 3]
    assert tensors[1].tolist() == [[7] * 5, [0] * 5, [0, 1, 2, 3, 4]]
    assert tensors[2].tolist() == [[True] * 5, [False] * 5, [False] * 5]
    place = staging.place_of(0)
    assert place == 0 and not staging.arrays[0][place].any()
    staging.write()
    assert tensors[0].tolist() == [[0] * 3, [0] * 3, [-(2**40)] * 3]
