# SPDX-License-Identifier: Apache-2.0
"""Training of Learn2PD's filter, on traces whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_dlm.learn2pd.collect import load_traces, save_traces
from vllm_dlm.learn2pd.recorder import IGNORED, RIGHT, WRONG, Traces
from vllm_dlm.learn2pd.train import THRESHOLD, train_filter
from vllm_dlm.strategies.base import Context
from vllm_dlm.strategies.learn2pd_files import filter_path, find_filter

WIDTH = 8


def neighbour_traces(num_blocks: int, seed: int = 0) -> Traces:
    """A position is right exactly where its left neighbour is sure (> 0.5)."""
    rng = np.random.default_rng(seed)
    confidence = rng.random((num_blocks * 4, WIDTH)).astype(np.float32)
    right = np.ones_like(confidence, dtype=bool)
    right[:, 1:] = confidence[:, :-1] > 0.5
    label = np.where(right, RIGHT, WRONG).astype(np.int8)
    label[rng.random(label.shape) < 0.3] = IGNORED
    return Traces(confidence, label, np.repeat(np.arange(num_blocks), 4))


def test_it_learns_what_no_threshold_on_the_position_itself_can():
    traces = neighbour_traces(400)
    filter, report = train_filter(traces, bound=0.05)
    assert report.blocks == 400
    assert report.rows == 1600
    assert report.accepted > 0.8 > report.accepted_by_threshold
    assert report.false_positive_rate < 0.1
    assert filter.threshold == THRESHOLD
    assert filter.block_length == WIDTH


@pytest.mark.parametrize("bound", [0.0, 0.02, 0.3])
def test_the_cut_is_calibrated_to_the_bound(bound):
    traces = neighbour_traces(600, seed=3)
    _, report = train_filter(traces, bound=bound, steps=300)
    # Held-out blocks other than those calibrated on: near the bound, not under it.
    assert report.false_positive_rate <= bound + 0.05


def test_ignored_positions_teach_nothing():
    traces = neighbour_traces(60)
    flipped = traces.label.copy()
    flipped[0] = IGNORED
    changed = traces.confidence.copy()
    again = Traces(changed, flipped, traces.block)
    one, _ = train_filter(again, steps=50)
    two, _ = train_filter(Traces(changed, flipped.copy(), traces.block), steps=50)
    assert (one.w1 == two.w1).all()  # the same seed, the same filter


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="9 blocks are too few"):
        train_filter(neighbour_traces(9))


def test_traces_without_a_decision_are_refused():
    traces = neighbour_traces(20)
    nothing = np.full_like(traces.label, IGNORED)
    with pytest.raises(ValueError, match="no masked position"):
        train_filter(Traces(traces.confidence, nothing, traces.block))


def test_traces_survive_a_file(tmp_path):
    traces = neighbour_traces(5)
    facts = {"model_key": "m", "cache": "dual", "source": "5 prompts"}
    save_traces(tmp_path / "new" / "t.safetensors", traces, facts)
    loaded, found = load_traces(tmp_path / "new" / "t.safetensors")
    assert found == facts
    np.testing.assert_allclose(loaded.confidence, traces.confidence, atol=1e-3)
    np.testing.assert_array_equal(loaded.label, traces.label)
    np.testing.assert_array_equal(loaded.block, traces.block)


def test_a_file_that_holds_no_traces_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="cannot read the traces"):
        load_traces(path)


def test_a_filter_is_saved_where_a_server_looks(tmp_path):
    filter, _ = train_filter(neighbour_traces(40), steps=10)
    filter = replace(filter, model_key="m-1", cache="dual")
    filter.save(filter_path(tmp_path, filter))
    context = Context(
        device=torch.device("cpu"),
        model="some/model",
        model_key="m-1",
        cache="dual",
        options={"filter_dir": str(tmp_path)},
    )
    assert find_filter(context, WIDTH) is not None
    assert find_filter(replace(context, cache="none"), WIDTH) is None
