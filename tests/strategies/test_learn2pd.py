# SPDX-License-Identifier: Apache-2.0
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import procedures
from reference.views import (
    C8,
    CPU,
    assert_rows_independent,
    chosen,
    expected,
    make_view,
    random_view,
)
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.learn2pd import Learn2PD, Learn2PDParams
from vllm_dlm.strategies.learn2pd_files import find_filter
from vllm_dlm.strategies.learn2pd_filter import Filter
from vllm_dlm.strategies.threshold import Threshold, ThresholdParams

# z_i = 40 c_i - 35, so tau = 0.96 is c > 0.95445 and tau = 0.9 is c > 0.92993.
STEEP = Filter(torch.eye(8), torch.zeros(8), 40 * torch.eye(8), torch.full((8,), -35.0))


def random_filter(seed: int, width: int = 8, hidden: int = 6) -> Filter:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Filter(
        normal(hidden, width), normal(hidden), normal(width, hidden), normal(width)
    )


def learn2pd(filter: Filter | None = STEEP, width: int = 8, **params) -> Learn2PD:
    strategy = Learn2PD(Learn2PDParams(**params), width, CPU)
    if filter is not None:
        strategy.filter = filter.to(CPU.device, torch.float64)
    return strategy


# --- The rule -------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "positions"), [(0.96, [1]), (0.9, [1, 5])])
def test_worked_block(tau, positions):
    assert chosen(learn2pd(threshold=tau), make_view([C8])) == [positions]


def test_the_schedule_forces_tokens_the_filter_rejects():
    view = make_view([C8], scheduled=torch.tensor([3]))
    assert chosen(learn2pd(), view) == [[1, 2, 5]]


def test_each_row_has_its_own_cut():
    params = {"threshold": torch.tensor([0.96, 0.9])}
    commit = learn2pd().select(make_view([C8, C8]), params).commit
    assert commit.sum(dim=1).tolist() == [1, 2]


def test_the_filter_sees_decided_positions_and_ones_beyond_the_end():
    # One hidden unit adds up all confidences: 3 decided or masked ones and 5 missing.
    total = Filter(
        torch.ones(1, 8), torch.zeros(1), torch.ones(8, 1), torch.full((8,), -7.5)
    )
    view = make_view([[0.9, 0.8, 0.7] + [0.0] * 5])
    view.masked[:, 3:] = False
    view.valid[:, 3:] = False
    logits = total.apply(torch.where(view.valid, view.confidence, 1.0))
    assert torch.allclose(logits, torch.full((1, 8), 0.9 + 0.8 + 0.7 + 5 - 7.5))
    # The sum is 7.4, so z = -0.1 everywhere.
    low, high = torch.tensor([-0.2, 0.0]).sigmoid().tolist()
    assert chosen(learn2pd(total, threshold=low), view) == [[1, 2]]
    assert chosen(learn2pd(total, threshold=high), view) == [[1]]


@given(seed=st.integers(0, 2**20), tau=st.floats(0.05, 0.95))
def test_agrees_with_the_row_wise_reference(seed, tau):
    view, filter = random_view(seed), random_filter(seed)
    want = []
    for row in range(5):
        k = int(view.scheduled[row])
        rule = procedures.learn2pd(
            filter.w1, filter.b1, filter.w2, filter.b2, tau=tau, k=k
        )
        want.append(expected(rule, view)[row])
    assert chosen(learn2pd(filter, threshold=tau), view) == want


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(seed):
    assert_rows_independent(learn2pd(random_filter(seed)), random_view(seed), seed)


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    threshold=st.floats(0.001, 1.0),
    tau=st.floats(1e-4, 1 - 1e-4),
)
def test_the_identity_filter_is_the_threshold_rule(seed, ties, threshold, tau):
    view = random_view(seed, ties=ties)
    view.scheduled.fill_(1)
    # The hardest confidences: the threshold itself and its neighbours.
    edge = np.float32(threshold)
    near = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(2))]
    view.confidence[:, ::2] = torch.tensor(near + near[:1])
    view.confidence[view.confidence > 1] = 1.0
    identity = learn2pd(Filter.identity(8, threshold, tau), threshold=tau)
    rule = Threshold(ThresholdParams(threshold=threshold), 8, CPU)
    assert chosen(identity, view) == chosen(rule, view)


# --- Filters and files ----------------------------------------------------------


def test_a_file_keeps_everything(tmp_path):
    path = tmp_path / "deep" / "b8-dual.safetensors"
    saved = replace(
        random_filter(1),
        threshold=0.93,
        model_key="abc",
        cache="dual",
        source="toy sums",
        false_positive_rate=0.0125,
    )
    saved.save(path)
    loaded = Filter.load(path)
    for name in ("w1", "b1", "w2", "b2"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    for name in ("threshold", "model_key", "cache", "source", "false_positive_rate"):
        assert getattr(loaded, name) == getattr(saved, name)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["block_length"] == "8"
    assert list(path.parent.iterdir()) == [path]


def test_calibration_moves_the_cut_only():
    filter = replace(random_filter(2), threshold=0.7)
    moved = filter.calibrated(0.96)
    confidence = torch.rand(50, 8)
    old = filter.apply(confidence).sigmoid() > 0.7
    assert torch.equal(moved.apply(confidence).sigmoid() > 0.96, old)
    assert moved.threshold == 0.96


def test_bad_filters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be \[H, B\]"):
        Filter(torch.eye(8), torch.zeros(7), torch.eye(8), torch.zeros(8))
    for threshold, tau in ((0.0, 0.96), (1.5, 0.96), (0.9, 1.0)):
        with pytest.raises(ValueError, match="must be in"):
            Filter.identity(8, threshold, tau)
    with pytest.raises(ValueError, match="cannot read the filter"):
        Filter.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no such thing")
    with pytest.raises(ValueError, match="cannot read the filter"):
        Filter.load(tmp_path / "text.safetensors")
    save_file({"w1": torch.eye(8)}, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="cannot read the filter"):
        Filter.load(tmp_path / "part.safetensors")


def test_where_filters_are_looked_for(tmp_path, caplog):
    model, learned = tmp_path / "model", tmp_path / "learned"
    model.mkdir()
    context = replace(
        CPU,
        model=str(model),
        model_key="key",
        cache="dual",
        options={"filter_dir": str(learned)},
    )
    assert find_filter(context, 8) is None

    replace(STEEP, source="learned").save(learned / "key" / "b8-dual.safetensors")
    replace(STEEP, source="other cache").save(learned / "key" / "b8-none.safetensors")
    found = find_filter(context, 8)
    assert found is not None
    assert found.source == "learned"

    shipped = model / "learn2pd" / "b8-dual.safetensors"
    random_filter(1, width=4).save(shipped)
    found = find_filter(context, 8)
    assert found is not None
    assert found.source == "learned"  # another block length is passed over
    with caplog.at_level(logging.WARNING):
        replace(STEEP, source="shipped", cache="none").save(shipped)
        found = find_filter(context, 8)
    assert found is not None
    assert found.source == "shipped"
    assert "trained under the cache policy 'none', but 'dual' is served" in caplog.text
    assert Learn2PD(Learn2PDParams(), 8, context).has_filter


def test_workers_of_a_model_use_the_first_ones_filter(tmp_path):
    """Their disks may differ: a learned filter lies on the first one's."""
    context = replace(CPU, model=str(tmp_path))
    firsts = learn2pd(STEEP).filter
    further = Learn2PD(Learn2PDParams(), 8, replace(context, agreed=lambda own: firsts))
    assert further.has_filter
    assert chosen(further, make_view([C8])) == chosen(learn2pd(), make_view([C8]))
    STEEP.save(tmp_path / "learn2pd" / "b8-none.safetensors")
    assert Learn2PD(Learn2PDParams(), 8, context).has_filter
    lacks = replace(context, agreed=lambda own: None)
    assert not Learn2PD(Learn2PDParams(), 8, lacks).has_filter


def test_without_a_filter_it_is_the_threshold_rule(tmp_path, caplog):
    random_filter(1, width=4).save(tmp_path / "learn2pd" / "b4-none.safetensors")
    context = replace(CPU, model=str(tmp_path), options={"online_learning": True})
    with caplog.at_level(logging.WARNING):
        strategies = [Learn2PD(Learn2PDParams(), 8, context) for _ in range(3)]
    assert len(caplog.records) == 1
    assert "until a filter is learned" in caplog.text
    assert "b4-none.safetensors (block length 4" in caplog.text
    assert not strategies[0].has_filter
    assert chosen(strategies[0], make_view([C8])) == [[1, 5]]


def test_a_named_file_must_fit(tmp_path, caplog):
    fits, wide = tmp_path / "fits.safetensors", tmp_path / "wide.safetensors"
    replace(STEEP, model_key="another").save(fits)
    random_filter(1, width=32).save(wide)
    STEEP.save(tmp_path / "learn2pd" / "b8-none.safetensors")
    context = replace(CPU, model=str(tmp_path), model_key="this")
    Learn2PD.validate(Learn2PDParams(), 16, context)
    Learn2PD.validate(Learn2PDParams(filter=str(fits)), 8, context)
    params = Learn2PDParams(filter=str(wide))
    for build in (Learn2PD, Learn2PD.validate):
        with pytest.raises(
            ValueError, match=r"length 32, not 8; available: .*length 8"
        ):
            build(params, 8, context)
    with pytest.raises(ValueError, match=r"cannot read .* available: .*learn2pd"):
        Learn2PD.validate(Learn2PDParams(filter="nowhere"), 8, context)
    with caplog.at_level(logging.WARNING):
        strategy = Learn2PD(Learn2PDParams(filter=str(fits)), 8, context)
    assert "trained on the model another, but this is served" in caplog.text
    assert chosen(strategy, make_view([C8])) == [[1]]


def test_a_damaged_file_is_passed_over(tmp_path, caplog):
    damaged = tmp_path / "learn2pd" / "b8-none.safetensors"
    damaged.parent.mkdir()
    damaged.write_text("nothing")
    context = replace(CPU, model=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        strategy = Learn2PD(Learn2PDParams(), 8, context)
    assert "it is passed over" in caplog.text
    assert "as by `threshold`" in caplog.text
    assert not strategy.has_filter


def test_registered_with_bounds():
    assert STRATEGIES["learn2pd"] is Learn2PD
    assert Learn2PD.logit_rows == "block"
    assert Learn2PD.eotp == "block"
    assert numeric_fields(Learn2PDParams) == ["threshold"]
    with pytest.raises(ValidationError):
        Learn2PDParams(threshold=1.0)


def test_admission_reads_no_file_twice(tmp_path, monkeypatch):
    """A client may name a block length that no filter fits, as often as it likes."""
    from vllm_dlm.strategies import learn2pd_filter

    STEEP.save(named := tmp_path / "named.safetensors")
    for length in range(1, 60):
        STEEP.save(tmp_path / "learn2pd" / f"b{length}-none.safetensors")
    reads = []
    read = learn2pd_filter.read_safetensors
    monkeypatch.setattr(
        learn2pd_filter,
        "read_safetensors",
        lambda path, *rest: reads.append(path) or read(path, *rest),
    )
    params = Learn2PDParams(filter=str(named))
    context = replace(CPU, model=str(tmp_path))
    for _ in range(5):
        with pytest.raises(ValueError, match="length 8, not 4; available"):
            Learn2PD.validate(params, 4, context)
    assert len(reads) == len(set(reads))
    assert len(reads) < 30, "not every file that there is"
