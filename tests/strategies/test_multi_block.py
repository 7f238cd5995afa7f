# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.place_rules import FlightLog
from reference.place_rules import multi_block as rule
from reference.views import (
    CPU,
    assert_rows_independent,
    chosen,
    expected,
    make_view,
    random_view,
    select,
)
from reference.walks import assert_agrees, assert_rows_alone, random_block, walk

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.entropy import Entropy, EntropyParams
from vllm_dlm.strategies.multi_block import MultiBlock, MultiBlockParams
from vllm_dlm.testing import check_strategy

# Three blocks of 4; `#` is written, `.` masked.
CANVAS = "#.## .#.. ...."
CONFIDENCE = [1.0, 0.6, 1.0, 1.0, 0.95, 1.0, 0.7, 0.5, 0.99, 0.3, 0.92, 0.2]
modes = st.fixed_dictionaries(
    {
        "by": st.sampled_from(["entropy", "confidence"]),
        "push": st.sampled_from(["first", "each"]),
    }
)
numbers = st.fixed_dictionaries(
    {
        "block": st.integers(1, 9),
        "threshold": st.floats(0.0, 1.5),
        "open_at": st.floats(0.01, 1.0),
        "due_at": st.floats(0.0, 1.0),
    }
)


def multi_block(width: int = 12, **params: Any) -> MultiBlock:
    given_ = {"threshold": 0.5} | params
    return MultiBlock(MultiBlockParams(**given_), width, CPU)


def worked_view(canvas: str = CANVAS, **changes: Any) -> View:
    """A canvas; the less sure, the more entropy."""
    masked = torch.tensor([[place == "." for place in canvas.replace(" ", "")]])
    row = torch.tensor([CONFIDENCE])
    return make_view(row, masked, entropy=1 - row, **changes)


@pytest.mark.parametrize(
    ("params", "positions"),
    [
        # Block 1 is a quarter written, block 2 therefore open at a tenth.
        ({"threshold": 0.2}, [1, 4, 8, 10]),
        ({"threshold": 0.2, "open_at": 0.5}, [1, 4]),
        ({"threshold": 0.2, "open_at": 1.0}, [1]),
        ({"threshold": 0.45}, [1, 4, 6, 8, 10]),
        # The surest of all, and the first block's.
        ({"threshold": 0.0}, [1, 8]),
        ({"threshold": 0.0, "push": "each"}, [1]),
        # Block 0 is three quarters written: block 1 is due from there on.
        ({"threshold": 0.0, "push": "each", "due_at": 0.75}, [1, 4]),
        ({"threshold": 0.0, "push": "each", "due_at": 0.25}, [1, 4, 8]),
        ({"threshold": 0.9, "by": "confidence"}, [1, 4, 8, 10]),
        ({"threshold": 0.99, "by": "confidence"}, [1, 8]),
        ({"threshold": 0.99, "by": "confidence", "push": "each"}, [1]),
    ],
)
def test_worked_canvas(params, positions):
    assert chosen(multi_block(block=4, **params), worked_view()) == [positions]


def test_what_is_sure_in_a_block_that_is_not_open_waits():
    view = worked_view(".... .... ....")
    assert chosen(multi_block(block=4), view) == [[0, 1, 2, 3]]
    assert chosen(multi_block(block=4, threshold=0.1), view) == [[0, 2, 3]]


def test_a_prompt_in_the_first_block_is_no_part_of_it():
    """Of block 0 only positions 2 and 3 are output: one of them is half of it."""
    positions = torch.arange(-2, 10)[None]
    view = worked_view("##.# .... ....", positions=positions)
    view.decided[:, :2] = False
    assert chosen(multi_block(block=4, open_at=0.5, threshold=0.1), view) == [[2, 4, 5]]
    assert chosen(multi_block(block=4, open_at=0.6, threshold=0.1), view) == [[2]]


def test_the_canvas_ends_behind_the_first_end_of_text_that_is_written():
    is_eos = torch.zeros(1, 12, dtype=torch.bool)
    is_eos[0, [7, 8, 10]] = True  # 7 is not sure
    view = worked_view(is_eos=is_eos)
    params = {"block": 4, "threshold": 0.2}
    cut = select(multi_block(**params), view).truncate_at
    assert cut is not None and cut.tolist() == [8]
    cut = select(multi_block(**params, open_at=0.5), view).truncate_at
    assert cut is not None and cut.tolist() == [-1]
    assert select(multi_block(**params, cut_at_end=False), view).truncate_at is None


def test_a_row_without_masks_commits_nothing():
    for push in ("first", "each"):
        view = worked_view("#### #### ####")
        assert chosen(multi_block(block=4, push=push), view) == [[]]


@given(seed=st.integers(0, 2**20), ties=st.booleans(), row=numbers, mode=modes)
def test_agrees_with_the_row_wise_reference(seed, ties, row, mode):
    view = random_view(seed, ties=ties)
    assert chosen(multi_block(8, **row, **mode), view) == expected(
        rule(**row, **mode), view
    )


@given(
    seed=st.integers(0, 2**20),
    rows=st.lists(numbers, min_size=4, max_size=4),
    mode=modes,
)
def test_agrees_on_whole_canvases(seed, rows, mode):
    view, probabilities = random_block(seed)
    strategy = multi_block(6, **mode)
    assert_agrees(
        strategy, lambda **row: rule(**row, **mode), view, probabilities, rows
    )
    assert_rows_alone(strategy, view, probabilities, rows)


@given(seed=st.integers(0, 2**20), row=numbers, mode=modes)
def test_rows_are_independent(seed, row, mode):
    assert_rows_independent(multi_block(8, **row, **mode), random_view(seed), seed)


@given(seed=st.integers(0, 2**20), row=numbers, mode=modes)
def test_what_is_in_flight_follows_from_the_canvas(seed, row, mode):
    """The published loops remember which blocks they have begun; nothing is lost."""
    width, block = 12, (1, 2, 3, 4, 6)[row["block"] % 5]
    row = row | {"block": block}
    view, probabilities = random_block(seed, rows=1, width=width)
    everything = torch.ones(1, width, dtype=torch.bool)
    start = make_view(torch.zeros(1, width), everything)
    log = FlightLog(width // block)
    shares = [float(torch.tensor(row[name])) for name in ("open_at", "due_at")]
    for seen, decision in walk(
        multi_block(width, **row, **mode), start, probabilities, [row]
    ):
        in_flight = log.begin_step(block, *shares)
        written = decision.commit[0].nonzero()[:, 0].tolist()
        assert all(i < in_flight * block for i in written)
        sure = (
            seen.entropy[0] <= torch.tensor(row["threshold"])
            if mode["by"] == "entropy"
            else seen.confidence[0] > torch.tensor(row["threshold"])
        )
        begun = seen.masked[0].clone()
        begun[in_flight * block :] = False
        assert not (begun & sure & ~decision.commit[0]).any()
        for number in range(in_flight):
            of_block = slice(number * block, (number + 1) * block)
            if mode["push"] == "each" and log.is_due[number] and log.masks[number]:
                assert decision.commit[0, of_block].any()
            log.masks[number] -= int(decision.commit[0, of_block].sum())


@given(seed=st.integers(0, 2**20), threshold=st.floats(0.0, 2.0))
def test_one_block_is_entropy_decoding(seed, threshold):
    view = random_view(seed)
    entropy = Entropy(EntropyParams(threshold=threshold), 8, CPU)
    whole = multi_block(8, block=8, threshold=threshold)
    assert chosen(whole, view) == chosen(entropy, view)


def test_the_kit_finds_nothing():
    params = {"block": 3, "by": "confidence", "threshold": 0.9, "push": "each"}
    check_strategy(MultiBlock, params=params, block_length=8, compiling="no")


def test_registered_with_bounds():
    assert STRATEGIES["multi_block"] is MultiBlock
    assert MultiBlock.needs == multi_block().needs == {"entropy"}
    assert multi_block(by="confidence").needs == frozenset()
    assert MultiBlockParams().model_dump() == {
        "block": 0,
        "by": "entropy",
        "threshold": 0.5,
        "open_at": 0.1,
        "due_at": 0.95,
        "push": "first",
        "cut_at_end": True,
    }
    names = ["block", "threshold", "open_at", "due_at"]
    assert numeric_fields(MultiBlockParams) == names
    for bad in (
        {"block": -1},
        {"threshold": -0.1},
        {"open_at": 0.0},
        {"open_at": 1.1},
        {"due_at": 1.1},
        {"push": "none"},
        {"by": "margin", "threshold": 0.5},
    ):
        with pytest.raises(ValidationError):
            MultiBlockParams(**bad)
