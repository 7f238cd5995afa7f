# SPDX-License-Identifier: Apache-2.0
"""The request table: what a request finds in its slot, and who may write there."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference.views import CPU

import vllm_dlm
from vllm_dlm.config.cache import Reach
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.model_executor.columns import (
    FACTS,
    FLOATS,
    LIVE,
    NEVER,
    NO_TOKEN,
    REACH,
    number_columns,
)
from vllm_dlm.model_executor.facts import RequestFacts
from vllm_dlm.model_executor.host_slots import BLOCK, MASKS, OPEN_MASKS
from vllm_dlm.model_executor.layout import Limits, lay_out
from vllm_dlm.model_executor.planning.block_rows import Blocks, pack
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Params, Strategy, numeric_fields

MASK = 99
LENGTH = 24
FULL = ModelDefaults("threshold", 4, MASK)
LEADS = ModelDefaults(
    "threshold", 4, MASK, attention="block", shift=1, block_origin="start"
)


def table() -> RequestSlots:
    return RequestSlots(3, LENGTH, MASK, torch.device("cpu"))


def request(
    model: ModelDefaults, known: int, prompt_len: int, name: str = "a", **options: Any
) -> RequestFacts:
    """A request of 8 tokens, `known` of prompt and output together."""
    config = resolve(DlmConfig(**options), None, model).sized(8, 16)
    layout = lay_out(
        config,
        model,
        Limits(16, LENGTH),
        prompt_len=prompt_len,
        num_known=known,
        max_tokens=8,
    )
    params: Any = SimpleNamespace()
    return RequestFacts(name, config, layout, params, 0, (), measures_drawn=False)


def test_a_new_request_is_its_prompt_and_masks():
    slots = table()
    slots.admit(1, request(FULL, 5, 5), [7] * 5)
    slots.write_staged()
    assert slots.tokens[1].tolist() == [7] * 5 + [MASK] * 19
    assert slots.masked[1].tolist() == [False] * 5 + [True] * 19
    assert int(slots.block_start[1]) == slots.host.block_start[1] == 5
    assert int(slots.step[1]) == int(slots.emitted[1]) == 0
    assert slots.host.masked[1, :4].all()
    # The first forward says how wide the canvas is.
    assert slots.host.canvas_end[1] == 0
    assert int(slots.text_end[1]) == slots.host.text_end[1] == 13
    # No other slot is touched.
    assert not slots.masked[0].any() and not slots.masked[2].any()


def test_a_request_that_returns_has_its_lead_and_masks():
    """Blocks from 0: the block [8, 12) begins behind the prompt, with its lead."""
    slots = table()
    slots.admit(0, request(LEADS, 10, 6), list(range(10)))
    slots.write_staged()
    assert slots.tokens[0].tolist() == [*range(9)] + [MASK] * 15
    assert slots.masked[0].tolist() == [False] * 9 + [True] * 15
    assert int(slots.block_start[0]) == int(slots.frontier[0]) == 8
    assert int(slots.step[0]) == 1
    assert int(slots.emitted[0]) == 4
    assert slots.host.masked[0, :4].tolist() == [False, True, True, True]
    assert not slots.host.leads[0]
    assert slots.host.canvas_end[0] == slots.host.text_end[0] == 16


def test_a_slot_that_is_used_again_keeps_nothing():
    slots = table()
    slots.admit(1, request(LEADS, 10, 6, "a", reference_exact=True), list(range(10)))
    slots.write_staged()
    assert slots.slot_of("a") == 1
    slots.release(1)
    assert slots.slot_of("a") is None and not slots.requests
    slots.admit(1, request(FULL, 3, 3, "b"), [1, 2, 3])
    slots.write_staged()
    fresh = table()
    fresh.admit(1, request(FULL, 3, 3, "b"), [1, 2, 3])
    fresh.write_staged()
    for name, column in columns(slots).items():
        assert torch.equal(column, columns(fresh)[name]), name


@pytest.mark.parametrize(
    ("strategy", "reads", "rewrites"),
    [("threshold", OPEN_MASKS, 0), ("freedave", MASKS, 0), ("saber", BLOCK, 1)],
)
def test_what_a_strategy_does(strategy: str, reads: int, rewrites: int):
    slots = table()
    of = request(FULL, 5, 5, strategy=strategy)
    slots.admit(0, of, [7] * 5)
    made = STRATEGIES[strategy](of.config.params, 4, CPU)
    slots.assign_strategy(0, made, group=0, seat=3, wasted_steps=1)
    slots.write_staged()
    assert slots.host.reads[0] == reads
    assert int(slots.may_rewrite[0]) == rewrites
    assert int(slots.step_limit[0]) == made.step_limit(of.config.params) + 1
    assert int(slots.reference_steps[0]) == NEVER
    assert int(slots.seat[0]) == 3
    assert bool(slots.has_branches[0]) == (strategy == "freedave")
    slots.host.read_whole_block(0)
    assert slots.host.reads[0] == BLOCK
    slots.release(0)
    assert not slots.strategies


# -- tensors and their columns -----------------------------------------------------


def test_columns_are_views_of_a_few_tensors():
    slots = table()
    names = (*FACTS, *FLOATS, *LIVE)
    of = [*slots.facts.unbind(1)[: len(FACTS)]]
    of += [*slots.facts_f.unbind(1)[: len(FLOATS)], *slots.live.unbind(1)]
    named = columns(slots) | dict(zip(REACH, slots.reach.unbind(1), strict=True))
    for name, column in zip(names, of, strict=True):
        assert named[name].data_ptr() == column.data_ptr(), name
        assert named[name].stride() == column.stride(), name
    assert slots.facts.dtype == slots.live.dtype == slots.stop_ids.dtype == torch.int64
    assert slots.facts_f.dtype == torch.float32
    rows = {len(column) for column in columns(slots).values()}
    assert rows == {4} and slots.num_slots == 3


def test_no_tensor_is_over_another():
    """A number for each cell of every tensor, and all are still there."""
    slots = table()
    tensors = [slots.facts, slots.stop_ids, slots.facts_f, slots.live, slots.tokens]
    numbers = [
        torch.arange(tensor.numel()).view(tensor.shape) + 1000 * nth
        for nth, tensor in enumerate(tensors)
    ]
    for tensor, values in zip(tensors, numbers, strict=True):
        tensor.copy_(values)
    for tensor, values in zip(tensors, numbers, strict=True):
        assert torch.equal(tensor, values.to(tensor.dtype))


def test_the_dummy_slot_divides_safely():
    slots = table()
    dummy = slots.num_slots
    for column in (
        slots.steps_per_block,
        slots.block_length,
        slots.sub_block_length,
        slots.text_end - slots.prompt_len,
    ):
        assert column[dummy] == 1
    reach = Reach(*slots.reach[dummy].tolist())
    assert reach.refresh_every == reach.part == 1
    assert not slots.masked[dummy].any()
    nothing = pack({}, np.zeros((0, 4), dtype=np.int64), dummy, 0)
    blocks = Blocks.unpacked(torch.from_numpy(nothing), slots)
    ends, keeps_masks = slots.ending(blocks)
    assert not ends.any() and not keeps_masks.any()
    assert (slots.stop_ids == NO_TOKEN).all()


def test_strategies_share_the_columns_of_their_numbers():
    slots = table()
    for name in STRATEGIES:
        params = STRATEGIES[name].Params
        at = number_columns(params)
        assert [*at] == numeric_fields(params)
        assert len({*at.values()}) == len(at)
        for field, (is_int, column) in at.items():
            assert is_int == (params.model_fields[field].annotation is int)
            columns_ = slots.numbers if is_int else slots.numbers_f
            assert column < columns_.shape[1]


def test_more_numbers_make_more_columns(monkeypatch: pytest.MonkeyPatch):
    class Many(Params):
        a: int = 1
        b: float = 1.0
        c: int = 1
        d: int = 1
        e: int = 1
        f: int = 1
        g: str = ""

    class OfAnotherPackage(Strategy):
        name = "of_another_package"
        Params = Many

    before = table()
    monkeypatch.setattr(STRATEGIES, "_targets", dict(STRATEGIES._targets))
    monkeypatch.setattr(STRATEGIES, "_loaded", dict(STRATEGIES._loaded))
    STRATEGIES.register(OfAnotherPackage.name, OfAnotherPackage)
    # One that cannot be imported is no other's harm.
    STRATEGIES._targets["broken"] = "no_such_package:Broken"
    after = table()
    assert after.numbers.shape[1] == 5 > before.numbers.shape[1]
    assert after.numbers_f.shape == before.numbers_f.shape


# -- one writer ------------------------------------------------------------------


def columns(slots: RequestSlots) -> dict[str, torch.Tensor]:
    """What the table keeps on the device, by name."""
    return {name: part for name, part in vars(slots).items() if torch.is_tensor(part)}


class Writes(ast.NodeVisitor):
    """Columns that a file writes: staged, by index, by `blocks.write`, in place."""

    def __init__(self, names: set[str]) -> None:
        self.names = names
        self.found: set[str] = set()

    def _note(self, node: ast.expr) -> None:
        while isinstance(node, ast.Subscript | ast.Call):
            node = node.value if isinstance(node, ast.Subscript) else node.func
        if isinstance(node, ast.Attribute) and node.attr in self.names:
            self.found.add(node.attr)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            for part in parts:
                if isinstance(part, ast.Subscript):
                    self._note(part)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._note(node.target)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute):
            if node.func.attr.endswith("_") and not node.func.attr.endswith("__"):
                self._note(node.func.value)
            if node.func.attr == "write" and node.args:
                self._note(node.args[0])
            if node.func.attr == "stage":
                self.found |= {keyword.arg for keyword in node.keywords} & self.names
        self.generic_visit(node)


def test_where_a_request_stands_is_written_at_admission_and_by_the_advance():
    folder = Path(vllm_dlm.__file__).parent
    slots = table()
    names = {*columns(slots)}
    names |= {n for n, v in vars(slots.host).items() if not n.startswith("_")}
    written = {}
    for file in sorted((folder / "model_executor").rglob("*.py")):
        writes = Writes(names)
        writes.visit(ast.parse(file.read_text()))
        if writes.found:
            written[str(file.relative_to(folder / "model_executor"))] = writes.found
    sampling = {"temperature", "top_p", "min_p", "top_k", "seed", "min_tokens"}
    sampling |= {"stop_ids"}
    wholes = {"_constants", "facts", "facts_f", "live", "numbers", "numbers_f"}
    lookout = {"lookout_end", "lookout_counts"}
    # What of these is an array follows from the layout, or from the strategy.
    admitted = {*columns(slots)} - wholes - sampling - {"reach"} - lookout
    admitted |= {"numbers"}
    admitted |= {"numbers_f"}
    assert written == {
        "columns.py": {"stop_ids"},
        "slots.py": admitted | {"reads", "group"},
        "sampling/candidates.py": sampling,
        "host_slots.py": {*vars(slots.host)} - {"_arriving", "group"},
        "sampling/lookout.py": lookout,
        "sampling/advance.py": {"tokens", "masked", "live", "canvas_end"},
        # In place of that, where the hole of a canvas is elastic.
        "sampling/moving.py": {"tokens", "masked"},
        # Those of the reply.
        "reply.py": {"tokens", "masked"},
    }
