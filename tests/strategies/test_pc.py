# SPDX-License-Identifier: Apache-2.0
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import place_rules
from reference.views import (
    C8,
    CPU,
    assert_rows_independent,
    chosen,
    expected,
    make_view,
    random_view,
)
from safetensors.torch import save_file

from vllm_dlm.config.options import SERVER_PARAMETER
from vllm_dlm.strategies import STRATEGIES, pc
from vllm_dlm.strategies.base import Context, View, numeric_fields
from vllm_dlm.strategies.pc import PcSampler, PcSamplerParams
from vllm_dlm.strategies.static import Static, StaticParams
from vllm_dlm.strategies.token_frequencies import load_frequencies, save_frequencies

# Of the ids 0 to 3; random views have candidates to 89, that is also unseen ones.
WORKED = [0.05, 0.001, 1e-4, 1e-5]
FREQUENCIES = torch.rand(60, generator=torch.Generator().manual_seed(0)) ** 4 + 1e-6
FREQUENCIES = (FREQUENCIES / 2).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    save_frequencies(folder / "worked.safetensors", torch.tensor(WORKED), {})
    save_frequencies(folder / "random.safetensors", FREQUENCIES, {"tokens": "1"})
    return folder


def sampler(path: Path | None = None, **params: Any) -> PcSampler:
    params |= {} if path is None else {"frequencies": str(path)}
    return PcSampler(PcSamplerParams(**params), 8, CPU)


def worked_view(**changes: Any) -> View:
    masked = torch.ones(1, 4, dtype=torch.bool)
    return make_view([[0.9, 0.8, 0.9, 0.7]], masked, **changes)


def order(strategy: PcSampler, view: View) -> list[int]:
    """Positions in the order in which the strategy would take them."""
    taken: list[int] = []
    for count in range(1, view.masked.shape[1] + 1):
        view.scheduled.fill_(count)
        taken += [i for i in chosen(strategy, view)[0] if i not in taken]
    return taken


# Scores 2.696, 4.304, 5.028, 3.807.
def test_worked_block(folder):
    strategy = sampler(folder / "worked.safetensors")
    assert order(strategy, worked_view()) == [2, 1, 3, 0]


@pytest.mark.parametrize(
    ("params", "positions"),
    [
        # -c log f: 2.696, 5.526, 8.289, 8.059.
        ({"position_weight": 0.0}, [2, 3, 1, 0]),
        ({"position_weight": 0.0, "most": 5.0}, [1, 2, 3, 0]),
        ({"position_weight": 5.0}, [0, 1, 2, 3]),
        ({"most": 1e-3}, [0, 1, 2, 3]),
    ],
)
def test_parameters(folder, params, positions):
    strategy = sampler(folder / "worked.safetensors", **params)
    assert order(strategy, worked_view()) == positions


@pytest.mark.parametrize(
    ("weight", "positions"), [(0.25, [2, 3]), (0.0, [3, 7]), (1.0, [1, 2])]
)
def test_the_documented_block(tmp_path, weight, positions):
    path = tmp_path / "documented.safetensors"
    table = [0.5, 0.05, 1e-3, 1e-5, 0.01, 0.03, 1e-5, 1e-4]  # of candidates 0 to 7
    save_frequencies(path, torch.tensor(table), {})
    view = make_view([C8], scheduled=torch.tensor([2]))
    assert chosen(sampler(path, position_weight=weight), view) == [positions]


def test_the_scheduled_number_is_written(folder):
    view = worked_view(scheduled=torch.tensor([2]))
    assert chosen(sampler(folder / "worked.safetensors"), view) == [[1, 2]]


def test_far_out_in_a_text_scores_do_not_vanish(folder):
    view = worked_view(positions=torch.arange(4)[None] + 100_000)
    assert order(sampler(folder / "worked.safetensors"), view) == [2, 1, 3, 0]


def test_ids_beyond_the_table_are_as_rare_as_its_rarest(folder):
    unseen = torch.tensor([[0, 1, 2, 1000]])
    strategy = sampler(folder / "worked.safetensors")
    assert order(strategy, worked_view(candidate=unseen)) == [2, 1, 3, 0]


@given(
    seed=st.integers(0, 2**20),
    ties=st.booleans(),
    weight=st.floats(0, 3, width=32),
    most=st.floats(2, 20, width=32),
)
def test_agrees_with_the_row_wise_reference(folder, seed, ties, weight, most):
    view = random_view(seed, ties=ties)
    strategy = sampler(folder / "random.safetensors", position_weight=weight, most=most)
    rule = place_rules.pc(FREQUENCIES, weight, most)
    assert chosen(strategy, view) == expected(rule, view)


@given(seed=st.integers(0, 2**20))
def test_other_rows_do_not_matter(folder, seed):
    strategy = sampler(folder / "random.safetensors")
    assert_rows_independent(strategy, random_view(seed), seed)


def test_each_row_has_its_own_numbers(folder):
    params = {
        "position_weight": torch.tensor([0.25, 0.0, 5.0]),
        "most": torch.tensor([10.0, 5.0, 10.0]),
    }
    masked = torch.ones(3, 4, dtype=torch.bool)
    view = make_view([[0.9, 0.8, 0.9, 0.7]] * 3, masked)
    commit = sampler(folder / "worked.safetensors").select(view, params).commit
    assert [row.nonzero()[:, 0].tolist() for row in commit] == [[2], [1], [0]]


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_with_equal_frequencies_and_no_weight_it_is_static(seed, ties):
    view = random_view(seed, ties=ties)
    static = Static(StaticParams(), 8, CPU)
    assert chosen(sampler(position_weight=0.0), view) == chosen(static, view)


@given(seed=st.integers(0, 2**20), ties=st.booleans())
def test_with_a_large_weight_it_goes_from_left_to_right(folder, seed, ties):
    view = random_view(seed, ties=ties)
    view = replace(view, confidence=view.confidence.clamp(min=0.01))
    strategy = sampler(folder / "random.safetensors", position_weight=100.0)
    static = Static(StaticParams(mode="left_to_right"), 8, CPU)
    assert chosen(strategy, view) == chosen(static, view)


def test_a_row_without_masks_commits_nothing(folder):
    view = worked_view()
    view.masked.fill_(False)
    assert chosen(sampler(folder / "worked.safetensors"), view) == [[]]


# -- the table -----------------------------------------------------------------


def test_the_models_own_table_is_found(tmp_path, caplog):
    model, filters = tmp_path / "model", tmp_path / "filters"
    context = Context(
        CPU.device, str(model), "key", options={"filter_dir": str(filters)}
    )

    def found() -> list[int]:
        strategy = PcSampler(PcSamplerParams(position_weight=0), 8, context)
        return order(strategy, worked_view())

    pc._announce_fallback.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert found() == [0, 2, 1, 3]  # by confidence
    assert str(model) in caplog.text and str(filters / "key") in caplog.text

    by_key = filters / "key" / "frequencies.safetensors"
    save_frequencies(by_key, torch.tensor(WORKED), {})
    assert found() == [2, 3, 1, 0]
    in_model = model / "pc" / "frequencies.safetensors"
    save_frequencies(in_model, torch.tensor(WORKED).flip(0), {})
    assert found() == [0, 1, 2, 3]
    in_model.write_text("nonsense")
    with caplog.at_level(logging.WARNING):
        assert found() == [2, 3, 1, 0]
    assert "passed over" in caplog.text


@pytest.mark.parametrize(
    ("table", "fragment"),
    [
        (torch.tensor([0.5, 0.0]), "holds 0; expected a share over 0 of every token"),
        (torch.tensor([0.5, 1.5]), "holds 1.5; expected at most 1"),
        (torch.tensor([0.5, torch.nan]), "holds NaN or infinite values"),
        (torch.ones(2, 2), r"its shape is \[2, 2\]; expected \[V\]"),
        (torch.ones(0), "nothing is in it"),
    ],
)
def test_a_wrong_table_is_refused_at_admission(tmp_path, table, fragment):
    path = tmp_path / "wrong.safetensors"
    save_frequencies(path, table, {})
    with pytest.raises(ValueError, match=f"wrong.safetensors: frequencies.*{fragment}"):
        PcSampler.validate(PcSamplerParams(frequencies=str(path)), 8, CPU)


def test_a_missing_table_is_refused_at_admission(tmp_path):
    for name in ("none", "other"):
        path = tmp_path / name
        if name == "other":
            save_file({"counts": torch.ones(3)}, path)
        with pytest.raises(ValueError, match="vllm-dlm count-tokens"):
            PcSampler.validate(PcSamplerParams(frequencies=str(path)), 8, CPU)
    PcSampler.validate(PcSamplerParams(), 8, CPU)


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "new" / "table.safetensors"
    save_frequencies(path, FREQUENCIES, {})
    assert torch.equal(load_frequencies(path), FREQUENCIES)


def test_registered_with_bounds():
    assert STRATEGIES["pc"] is PcSampler
    assert PcSamplerParams().model_dump() == {
        "position_weight": 0.25,
        "most": 10.0,
        "frequencies": None,
    }
    assert numeric_fields(PcSamplerParams) == ["position_weight", "most"]
    field = PcSamplerParams.model_fields["frequencies"]
    assert field.json_schema_extra == SERVER_PARAMETER
    for bad in (
        {"position_weight": -0.1},
        {"position_weight": 101},
        {"most": 0.0},
        {"frequencies": 3},
        {"alpha": 10},
    ):
        with pytest.raises(ValidationError):
            PcSamplerParams(**bad)
