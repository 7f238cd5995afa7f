# SPDX-License-Identifier: Apache-2.0
"""What the device finds of a guessed forward is what the host would have planned."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.host_slots import BLOCK, MASKS, OPEN_MASKS
from vllm_dlm.model_executor.layout import Limits, lay_out, scheduled_steps
from vllm_dlm.model_executor.planning.guesses import settle
from vllm_dlm.model_executor.planning.step_plan import SegmentPlan, plan_forward
from vllm_dlm.model_executor.running_ahead import (
    loses_nothing,
    runs_ahead,
    why_not_ahead,
)
from vllm_dlm.model_executor.slots import RequestSlots

LENGTH, B, MASK, SLOTS = 64, 4, 99, 6

MODELS = {
    "full": {},
    "full, shifted": {"shift": 1},
    "block": {"attention": "block", "block_origin": "start"},
    "block, shifted": {"attention": "block", "shift": 1},
    "causal, leads": {"attention": "causal", "leads": True},
}


class Table:
    """Some requests in the middle of their texts, on the device and on the host."""

    def __init__(self, source: random.Random, model: ModelDefaults) -> None:
        device = torch.device("cpu")
        self.slots = RequestSlots(SLOTS, LENGTH, MASK, device)
        self.facts: Any = SimpleNamespace(
            defaults=model,
            device=device,
            commits_alone=False,
            max_canvas=12,
            max_model_len=LENGTH,
            soft_inputs=False,
        )
        self.source = source
        self.layouts = []
        config = resolve(DlmConfig(sub_block_length=2), None, model).sized(20, 12)
        for slot in range(SLOTS):
            prompt_len = source.randint(1, 11)
            layout = lay_out(
                config,
                model,
                Limits(12, LENGTH),
                prompt_len=prompt_len,
                num_known=prompt_len,
                max_tokens=20,
            )
            self.layouts.append(layout)
            of: Any = SimpleNamespace(
                id=str(slot),
                config=config,
                layout=layout,
                runs_ahead=False,
                is_watched=False,
                canvas_end=0,
            )
            self.slots.admit(slot, of, [5] * prompt_len)
        self.slots.write_staged()
        host = self.slots.host
        for slot, layout in enumerate(self.layouts):
            begin = layout.first_block + B * source.randint(1, 3)
            end = begin + source.choice([B, B, 3, 2 * B])
            masked = np.array([source.random() < 0.6 for _ in range(B)])
            host.reads[slot] = source.choice([OPEN_MASKS, MASKS, BLOCK])
            host.block_start[slot], host.canvas_end[slot] = begin, end
            host.masked[slot, :B] = masked
            self.slots.block_start[slot], self.slots.canvas_end[slot] = begin, end
            self.slots.masked[slot, begin : begin + B] = torch.from_numpy(masked)

    def rows(self, slot: int) -> tuple[int, int]:
        """Rows of a forward that may follow, with right rows and with wrong ones."""
        begin = int(self.slots.block_start[slot])
        end = int(self.slots.canvas_end[slot])
        if not self.facts.defaults.reuses_blocks:
            return 0, end
        block_end = min(begin + B, end)
        left = begin - B
        return self.source.choice(
            [(begin, block_end), (left, block_end), (left, begin)]
        )

    def forget(self, ahead: list[bool]) -> None:
        """Leave the host what it knew of these when they were admitted."""
        host = self.slots.host
        for slot in np.nonzero(ahead)[0]:
            layout = self.layouts[slot]
            host.block_start[slot] = layout.first_block
            host.canvas_end[slot] = 0 if layout.is_full else layout.text_end
            host.masked[slot, :B] = True

    def plan(self, rows: list[tuple[int, int]], ahead: list[bool]) -> SegmentPlan:
        self.slots.host.runs_ahead[:] = ahead
        lengths = np.array([end - start for start, end in rows])
        batch: Any = SimpleNamespace(
            idx_mapping_np=np.arange(SLOTS),
            num_computed_tokens_np=np.array([start for start, _ in rows]),
            num_scheduled_tokens=lengths,
            num_draft_tokens_per_req=None,
            query_start_loc_np=np.concatenate([[0], np.cumsum(lengths)]),
            num_reqs=SLOTS,
        )
        whole = partial(settle, table=self.slots, facts=self.facts)
        return plan_forward(
            self.slots, self.facts, batch, 16, lambda group: whole(group.packed)
        )


def found(plan: SegmentPlan) -> dict[int, Any]:
    """Slot -> what is decided of it, and from which rows of the forward."""
    (group,) = plan.groups
    blocks = group.blocks
    result = {}
    for row, slot in enumerate(blocks.slots.tolist()):
        at = blocks.row_at[row]
        sources = torch.where(at >= 0, plan.logits_rows[at.clamp(min=0)].long(), at)
        result[slot] = (
            int(blocks.batch_rows[row]),
            int(blocks.canvas_end[row]),
            int(blocks.rows_ends[row]),
            bool(blocks.leads[row]),
            sources.tolist(),
        )
    return result


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(6))
def test_right_guesses(name: str, seed: int):
    source = random.Random(seed)
    model = ModelDefaults("threshold", B, MASK, **MODELS[name])
    table = Table(source, model)
    rows = [table.rows(slot) for slot in range(SLOTS)]
    known = table.plan(rows, [False] * SLOTS)
    wanted = found(known)
    if not model.leads_blocks:
        # Rows left of the block write its KV, and decide nothing.
        for slot, (_, end) in enumerate(rows):
            if end <= int(table.slots.block_start[slot]):
                del wanted[slot]
    ahead = [source.random() < 0.7 or slot == 0 for slot in range(SLOTS)]
    table.forget(ahead)
    plan = table.plan(rows, ahead)
    got = {slot: of for slot, of in found(plan).items() if slot != SLOTS}
    for slot, of in found(known).items():
        if not ahead[slot]:
            wanted[slot] = of
    assert got == wanted
    assert (plan.kv_lens_np == known.kv_lens_np).all()
    if model.attention == "causal":
        assert known.causal_np is not None and plan.causal_np is not None
        causal = torch.from_numpy(plan.causal_np).int()
        assert plan.guessed_left is not None
        causal.index_copy_(0, *plan.guessed_left)
        assert (causal.numpy() == known.causal_np).all()


@pytest.mark.parametrize("name", MODELS)
def test_wrong_guesses_decide_nothing(name: str):
    """As when the step before has cut the canvas, or filled it."""
    model = ModelDefaults("threshold", B, MASK, **MODELS[name])
    table = Table(random.Random(0), model)
    rows = [table.rows(slot) for slot in range(SLOTS)]
    begin = table.slots.block_start[:SLOTS].clone()
    if model.reuses_blocks:
        rows = [(int(at), int(at) + B) for at in begin]
        table.slots.canvas_end[:SLOTS] = begin + 2
    else:
        table.slots.canvas_end[:SLOTS] -= 1
        table.slots.canvas_end[0] = begin[0]
        rows[0] = 0, int(begin[0])
    table.forget([True] * SLOTS)
    plan = table.plan(rows, [True] * SLOTS)
    (group,) = plan.groups
    assert set(group.blocks.slots.tolist()) == {SLOTS}
    assert not (group.blocks.row_at >= 0).any()
    # vLLM goes on where these rows began.
    assert group.guessed is not None
    assert group.guessed.in_vain.tolist() == [end - start for start, end in rows]


def test_a_further_canvas_is_as_wide_as_the_scheduler_opens_it():
    model = ModelDefaults("threshold", B, MASK)
    table = Table(random.Random(1), model)
    begin = table.slots.block_start[:SLOTS].tolist()
    table.slots.canvas_end[:SLOTS] = table.slots.block_start[:SLOTS]
    ends = [
        layout.canvas_from(at) for layout, at in zip(table.layouts, begin, strict=True)
    ]
    plan = table.plan([(0, end) for end in ends], [True] * SLOTS)
    assert plan.groups[0].blocks.slots.tolist() == [*range(SLOTS)]
    assert plan.groups[0].blocks.canvas_end.tolist() == ends


# -- who runs ahead ----------------------------------------------------------------

FULL = ModelDefaults("threshold", 32, MASK)
BLOCKS = ModelDefaults("threshold", 32, MASK, attention="block")
LEADS = ModelDefaults("threshold", 32, MASK, attention="block", shift=1)
CAUSAL = ModelDefaults("threshold", 32, MASK, attention="causal", shift=1)
EAGER = {"drafts": 4, "eager": True}


def asks(model: ModelDefaults = FULL, **options: Any) -> bool:
    """Whether a request with these options of ours or of vLLM's runs ahead."""
    own = {
        name: options.pop(name) for name in [*options] if name in DlmConfig.model_fields
    }
    server = DlmConfig(**own)
    config = resolve(server, None, model).sized(64, 64)
    return runs_ahead(config, SamplingParams(**options), model, server)


def test_requests_that_need_the_host_do_not_run_ahead():
    assert asks() and asks(BLOCKS) and asks(LEADS) and asks(temperature=0.7)
    assert asks(strategy="learn2pd", online_learning=False)
    assert asks(eotp="token") and asks(strategy="joint")
    for options in (
        {"cache": "dual"},
        {"cache": "window"},
        {"strategy": "klass"},
        {"strategy": "freedave"},
        {"strategy": "learn2pd"},
        {"strategy": "lopa"},
        {"strategy": "joint", "strategy_config": {"penalty": 1.0}},
        {"eotp": "canvas"},
        {"growth": "daedal"},
        {"record_traces": True},
        {"step_map": True},
        {"reference_exact": True},
        {"logprobs": 0},
        {"min_tokens": 3},
        {"logit_bias": {5: 1.0}},
        {"allowed_token_ids": [5, 6]},
        {"bad_words": ["no"]},
        {"stop_token_ids": [*range(9)]},
    ):
        assert not asks(**options), options
    assert not asks(LEADS, cache="dual", sub_block_length=8)
    assert not asks(BLOCKS, strategy="multi_block")
    assert not asks(BLOCKS, strategy="freedave", strategy_config=EAGER)
    assert asks(CAUSAL) and not asks(CAUSAL, strategy="linear_spec")
    assert not asks(replace(FULL, expand_token=5))
    assert not asks(BLOCKS, tccf={"trigger": [1], "check": [2]})


def test_what_loses_nothing():
    def free(model: ModelDefaults, **options: Any) -> bool:
        server = DlmConfig(**options)
        return loses_nothing(resolve(server, None, model).sized(64, 64), model, server)

    assert free(FULL) and free(LEADS) and not free(BLOCKS)
    assert free(BLOCKS, strategy="static") and free(BLOCKS, async_blocks=2)
    assert not free(BLOCKS, strategy="static", sub_block_length=8)
    assert not free(FULL, cache="dual")
    assert not free(BLOCKS, strategy="freedave", strategy_config=EAGER)
    assert free(CAUSAL) and not free(CAUSAL, strategy="linear_spec")


def test_reasons_name_a_remedy():
    server = DlmConfig(cache="dual")
    plain = resolve(server, None, FULL).sized(64, 64)
    assert "--dlm-cache none" in (why_not_ahead(plain, FULL, server) or "")
    server = DlmConfig(strategy="linear_spec")
    plain = resolve(server, None, CAUSAL).sized(64, 64)
    assert "--dlm-strategy" in (why_not_ahead(plain, CAUSAL, server) or "")
    server = DlmConfig()
    plain = resolve(server, None, FULL).sized(64, 64)
    own = ["learn2pd", "trajectory_log"]
    assert why_not_ahead(plain, FULL, server, own) is None
    assert "uninstall" in (why_not_ahead(plain, FULL, server, [*own, "mine"]) or "")
    model = replace(FULL, expand_token=5)
    assert "another model" in (why_not_ahead(plain, model, server) or "")


@pytest.mark.parametrize(
    ("masks", "budget", "schedule", "attention", "steps"),
    [
        (4, 4, "even", "full", 4),
        (4, 3, "even", "full", 3),
        (2, 4, "even", "full", 2),
        (2, 3, "even", "block", 1),
        (3, 2, "even", "block", 2),
        (4, 3, "rounded", "block", 3),
        (1, 3, "rounded", "block", 1),
    ],
)
def test_steps_of_a_schedule(
    masks: int, budget: int, schedule: Any, attention: Any, steps: int
):
    model = ModelDefaults("static", B, MASK, schedule=schedule, attention=attention)
    layout: Any = SimpleNamespace(steps_per_block=budget, block_length=B)
    found = scheduled_steps(masks, layout, model, begins_with_lead=False)
    assert found == steps
