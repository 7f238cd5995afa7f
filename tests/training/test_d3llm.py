# SPDX-License-Identifier: Apache-2.0
"""Pseudo-trajectories: blocks and ratios that grow, masks of canvases on the way."""

import json

import pytest

from vllm_dlm.training.rows import Row, lay_out, step_generator

torch = pytest.importorskip("torch")

from training.distillation_cases import (  # noqa: E402
    END,
    MASK,
    batch_of,
)

from vllm_dlm.training.recipes import (  # noqa: E402
    d3llm,
)


def test_blocks_and_ratios_grow():
    sizes = [d3llm.block_length(step / 60) for step in range(60)]
    assert sizes == sorted(sizes)
    assert [sizes[step] for step in (0, 9, 10, 15, 20, 29, 30, 35, 40, 59)] == [
        *(16, 16, 16, 20, 24, 24, 24, 28, 32, 32)
    ]
    assert d3llm.block_length(0.999, [4]) == 4
    assert (d3llm.smallest_ratio(0), d3llm.smallest_ratio(0.5)) == (0, 0.4)


def test_masks_are_those_of_a_canvas_on_the_way():
    rows = [
        d3llm.TrajectoryRow([1, 10], [21, 22, 23, 24, END], [3, 0, 1, 4, 2]),
        d3llm.TrajectoryRow([1, 10, 11], [21, END], [1, 0]),
    ]
    batch = lay_out(rows, end_id=END, canvas_length=8)
    ranks = d3llm.ranks_of(rows, batch)
    assert ranks[0, 2:10].tolist() == [3, 0, 1, 4, 2, 5, 6, 7]
    assert ranks[1, 3:11].tolist() == [1, 0, 2, 3, 4, 5, 6, 7]
    seen = set()
    for step in range(60):
        # The least ratio is the largest: t is 0.8, and 8 - 0.8 x 8 is written.
        inputs, targets = d3llm.corrupt(
            batch, ranks, 8, 0.8, MASK, step_generator(1, step)
        )
        assert (
            targets[0, 0, 2:10].tolist() == [True, False, True, True, True] + [True] * 3
        )
        assert targets[0, 1, 2:10].tolist() == [False, True] + [False] * 6
        inputs, targets = d3llm.corrupt(
            batch, ranks, 4, 0.0, MASK, step_generator(2, step)
        )
        for row, start in enumerate(batch.prompt_lengths.tolist()):
            active = targets[row].any(0)
            first = int(active.int().argmax())
            assert active.sum() == 4 and (first - start) % 4 == 0
            assert not (targets[row, 0] & targets[row, 1]).any()
            assert (inputs[row, :, first + 4 : start + 8] == MASK).all()
            assert torch.equal(inputs[row, 0, :first], batch.ids[row, :first])
            order = ranks[row, active].tolist()
            masked = targets[row, 0, active].tolist()
            # Some number of tokens is written, and those are the first ones.
            late = min(
                rank for rank, is_mask in zip(order, masked, strict=True) if is_mask
            )
            if all(m == (r >= late) for r, m in zip(order, masked, strict=True)):
                seen.add((row, first - start, sum(masked)))
    assert len(seen) > 8


def test_rows_without_a_trajectory_have_random_masks():
    batch = batch_of([5] * 200, 16)
    ranks = d3llm.ranks_of([Row([1], [2])] * 200, batch)
    assert (ranks == -1).all()
    _, targets = d3llm.corrupt(batch, ranks, 16, 0.8, MASK, step_generator(1, 0))
    share = targets[:, 0].sum() / targets.any(1).sum()
    assert float(share) == pytest.approx(0.8, abs=0.03)


def test_a_log_s_requests_are_rows(tmp_path):
    lines = [
        {"request": "a", "prompt": [1, 10], "mask": MASK},
        {"request": "a", "block": [0, 4], "step": 0, "writes": [[1, 31], [3, END]]},
        {"request": "b", "prompt": [1, 11], "mask": MASK},
        {"request": "a", "block": [0, 4], "step": 1, "writes": [[0, 30], [1, 41]]},
        {"request": "b", "block": [0, 4], "step": 0, "writes": [[2, 31]]},
        {"request": "a", "block": [0, 4], "step": 2, "writes": [[2, END]]},
    ]
    file = tmp_path / "trajectories-1.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # What is behind the end is no part of a response; b has not ended.
    assert d3llm.read_log(tmp_path, END) == [
        d3llm.TrajectoryRow([1, 10], [30, 41, END], [1, 1, 2])
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[2:3]))
    with pytest.raises(ValueError, match="no request whose text is finished"):
        d3llm.read_log(tmp_path, END)
