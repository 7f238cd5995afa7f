# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference.views import (
    C8,
    CPU,
    assert_rows_independent,
    chosen,
    make_view,
    random_view,
    select,
)

from vllm_dlm.config.options import parse_params
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View, numeric_fields
from vllm_dlm.strategies.recordings import LONGEST_MAP
from vllm_dlm.strategies.replay import Replay, ReplayParams


def replay(steps: Sequence[int], block_length: int = 8) -> Replay:
    return Replay(ReplayParams(recorded_steps=steps), block_length, CPU)


def walk(strategy: Replay, first: int, view: View, limit: int = 40) -> list[list[int]]:
    """Positions that each step of one block writes, until none is masked."""
    width = view.masked.shape[1]
    positions = torch.arange(first, first + width)[None]
    written = []
    while view.masked.any():
        step = torch.tensor([len(written)])
        now = replace(view, positions=positions, step=step)
        decision = select(strategy, now)
        assert decision.idle is not None
        assert bool(decision.idle[0]) != bool(decision.commit.any())
        written.append(decision.commit[0].nonzero()[:, 0].tolist())
        view = replace(view, masked=view.masked & ~decision.commit)
        assert len(written) < limit
    return written


def by_hand(steps: Sequence[int], first: int, view: View) -> list[list[int]]:
    """The rule in plain Python, for a block that begins at output position `first`."""
    before = [s for s in steps[: max(first, 0)]]
    now = 1 + max([-1, *before])
    masked = view.masked[0].nonzero()[:, 0].tolist()
    confidence = view.confidence[0].tolist()

    def step_of(i: int) -> int:
        return steps[first + i] if first + i < len(steps) else -1

    written = []
    while masked:
        recorded = [i for i in masked if step_of(i) >= 0]
        due = [i for i in recorded if step_of(i) <= now]
        if not recorded:
            due = [max(masked, key=lambda i: (confidence[i], -i))]
        written.append(due)
        masked = [i for i in masked if i not in due]
        now += 1
    return written


# "C8": position 0 is decided already, 1..7 are masked.
@pytest.mark.parametrize(
    ("steps", "written"),
    [
        ([0, 0, 1, 3, 2, 0, 1, 2], [[1, 5], [2, 6], [4, 7], [3]]),
        # Nothing is recorded in steps 0 and 3.
        ([0, 1, 1, 2, 4, 4, 2, 1], [[], [1, 2, 7], [3, 6], [], [4, 5]]),
        # The map ends inside the block, and knows nothing of position 4.
        ([0, 0, 0, 1, -1, 1], [[1, 2], [3, 5], [4], [7], [6]]),
        ([5], [[1], [5], [2], [4], [7], [3], [6]]),
    ],
)
def test_worked_block(steps, written):
    assert walk(replay(steps), 0, make_view([C8])) == written


def test_a_later_block_begins_after_all_left_of_it():
    """Its recorded steps 4 and 6 are its own steps 0 and 2."""
    steps = [0, 2, 3, 1, 4, 6, 6, 4]
    view = make_view([C8[:4]], torch.ones(1, 4, dtype=torch.bool))
    assert walk(replay(steps, 4), 4, view) == [[0, 3], [], [1, 2]]


def test_a_prompt_may_share_the_block():
    view = make_view([C8[:4]], torch.tensor([[False, False, True, True]]))
    assert walk(replay([1, 0], 4), -2, view) == [[3], [2]]


@given(
    seed=st.integers(0, 2**20),
    steps=st.lists(st.integers(-1, 12), min_size=1, max_size=30),
    first=st.integers(-3, 24),
)
def test_agrees_with_the_rule_in_plain_python(seed, steps, first):
    view = random_view(seed, rows=1)
    # A prompt's tokens are no masks.
    view.masked[:, : max(-first, 0)] = False
    assert walk(replay(steps), first, view) == by_hand(steps, first, view)


@given(seed=st.integers(0, 2**20), steps=st.lists(st.integers(0, 9), min_size=1))
def test_other_rows_do_not_matter(seed, steps):
    assert_rows_independent(replay(steps), random_view(seed), seed)


def test_a_row_without_masks_commits_nothing():
    view = make_view([C8], torch.zeros(1, 8, dtype=torch.bool))
    assert chosen(replay([0] * 8), view) == [[]]


def test_a_block_has_room_for_all_recorded_steps():
    strategy = replay([30, 2])
    assert strategy.step_limit(strategy.params) == 31 + 8


def test_steps_that_no_recording_has():
    # Two blocks, each of 8 steps, as many that rewrite, 64 edits and one more.
    Replay.validate(ReplayParams(recorded_steps=[161, 0]), 8, CPU)
    with pytest.raises(ValueError, match="at most 161 is accepted"):
        Replay.validate(ReplayParams(recorded_steps=[162, 0]), 8, CPU)


def test_only_what_the_request_may_write_counts():
    """However long the map: a token does not wait for the steps of a book."""
    params = ReplayParams(recorded_steps=[500_000, *range(131_000)])
    short = replace(CPU, positions=32)
    with pytest.raises(ValueError, match="at most 257 is accepted"):
        Replay.validate(params, 32, short)
    Replay.validate(ReplayParams(recorded_steps=range(131_000)), 32, short)


def test_registered_with_bounds():
    assert STRATEGIES["replay"] is Replay
    assert numeric_fields(ReplayParams) == []
    for bad in ([-2], [10**7], ["one"], [0.5], [True], []):
        with pytest.raises(ValidationError):
            ReplayParams(recorded_steps=bad)
    with pytest.raises(ValueError, match="has 131073$"):
        parse_params(
            "replay", {"recorded_steps": [0] * (LONGEST_MAP + 1)}, where="here"
        )
    with pytest.raises(ValueError, match="steps: Field required"):
        parse_params("replay", {}, where="here")


def test_recorded_tokens_are_written_whatever_the_model_predicts():
    """Beyond the list, and in the prompt, the candidates stand."""
    params = ReplayParams(recorded_steps=[0] * 8, recorded_tokens=[70, 71, 72])
    strategy = Replay(params, 8, CPU)
    view = make_view([C8])
    view = replace(view, positions=torch.arange(-2, 6)[None])
    decision = select(strategy, view)
    assert decision.new_tokens is not None
    model = view.candidate[0].tolist()
    assert decision.new_tokens[0].tolist() == [*model[:2], 70, 71, 72, *model[5:]]


def test_recorded_tokens_must_be_tokens():
    known = replace(CPU, vocab_size=100, mask_id=99)
    Replay.validate(ReplayParams(recorded_steps=[0], recorded_tokens=[98]), 8, known)
    for token, message in ((100, "ids go from 0 to 99"), (99, "99 is the mask")):
        params = ReplayParams(recorded_steps=[0], recorded_tokens=[token])
        with pytest.raises(ValueError, match=message):
            Replay.validate(params, 8, known)
    with pytest.raises(ValidationError):
        ReplayParams(recorded_steps=[0], recorded_tokens=[-1])
    with pytest.raises(ValidationError, match="this one has 0"):
        ReplayParams(recorded_steps=[0], recorded_tokens=[])


def test_only_without_tokens_of_its_own_may_a_text_have_a_pattern():
    plain = ReplayParams(recorded_steps=[0])
    own = ReplayParams(recorded_steps=[0], recorded_tokens=[5])
    assert Replay.why_unconstrained(plain) is None
    assert Replay.why_unconstrained(own) == "it writes tokens of its own choice"
