# SPDX-License-Identifier: Apache-2.0
"""When filters are trained: seldom, and never again once one was learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference.recording import Batch
from reference.views import CPU, make_view

from vllm_dlm.learn2pd import online as learning
from vllm_dlm.learn2pd import recorder as traces
from vllm_dlm.learn2pd import train as training
from vllm_dlm.learn2pd.train import Report
from vllm_dlm.strategies.learn2pd import Learn2PD, Learn2PDParams
from vllm_dlm.strategies.learn2pd_filter import Filter

WIDTH = 4
REQUESTS = 32

GOOD = Report(0, 0, false_positive_rate=0.0, accepted=0.9, accepted_by_threshold=0.9)
SLOW = Report(0, 0, false_positive_rate=0.0, accepted=0.1, accepted_by_threshold=0.9)


class School:
    """Learning of one worker, whose trainings have an outcome that the test names."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        folder: Path,
        outcome: Report | Exception,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        patch.setattr(learning, "FIRST_ROWS", 64)
        patch.setattr(traces, "CAPACITY", 1024)
        patch.setattr(learning, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(learning, "get_tensor_model_parallel_world_size", lambda: ranks)
        patch.setattr(training, "train_filter", self._train)
        self.outcome = outcome
        self.rows = 0
        """Recorded so far."""
        self.trainings: list[int] = []
        """Rows recorded when each began."""
        self.renewed: list[str] = []
        self.batch = Batch(REQUESTS, WIDTH)
        state = self.batch.state
        state.server = SimpleNamespace(
            online_learning=True, record_traces=False, filters_path=lambda: folder
        )
        state.context = lambda cache: replace(CPU, model_key="no-such-model")
        # Without a filter for ever, as if what is saved could not be read.
        strategy = Learn2PD(Learn2PDParams(), WIDTH, CPU)
        groups: Any = SimpleNamespace(
            strategy_of=lambda slot: strategy, renew=self.renewed.append
        )
        self.learning = learning.Learning(state, groups)

    def _train(self, traces: traces.Traces, bound: float) -> tuple[Filter, Report]:
        self.trainings.append(self.rows)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return Filter.identity(WIDTH, 0.9), self.outcome

    def serve(self, steps: int) -> None:
        """New requests, and so many steps of them, each a whole block."""
        masked = torch.ones(REQUESTS, WIDTH, dtype=torch.bool)
        view = make_view(torch.rand(REQUESTS, WIDTH), masked)
        self.learning.take_over()
        for slot in range(REQUESTS):
            self.learning.add(slot)
        for _ in range(steps):
            self.rows = self.learning.recorder.rows(WIDTH, "none")
            self.learning.record(view, view.candidate, self.batch.plan)
            if self.learning._training is not None:
                self.learning._training.join()
            self.batch.go_on(ended=True)
        for slot in range(REQUESTS):
            self.learning.remove(slot)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "outcome", [SLOW, OSError("read-only folder"), RuntimeError("out of memory")]
)
def test_after_one_in_vain_half_as_many_rows_more(
    outcome: Report | Exception,
    ranks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Of all rows there were, eight times as many as are kept."""
    school = School(monkeypatch, tmp_path, outcome, ranks=ranks)
    for _ in range(16):
        school.serve(steps=16)
    wanted, expected = 64, []
    for rows in range(0, 16 * 16 * REQUESTS, REQUESTS):
        if rows >= wanted:
            expected.append(rows)
            wanted = 3 * rows // 2
    assert expected[-1] > 4 * 1024
    assert school.trainings == expected
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not school.renewed


@pytest.mark.parametrize(("ranks", "renewed"), [(1, ["learn2pd"]), (2, [])])
def test_one_that_was_learned_is_the_last(
    ranks: int, renewed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where requests to come do without it; nothing is recorded any more."""
    school = School(monkeypatch, tmp_path, GOOD, ranks=ranks)
    for _ in range(50):
        school.serve(steps=8)
    assert school.trainings == [64]
    assert school.learning.recorder.rows(WIDTH, "none") == 8 * REQUESTS
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert school.renewed == renewed


def test_further_workers_of_a_model_learn_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    school = School(monkeypatch, tmp_path, GOOD, rank=1, ranks=2)
    school.serve(steps=8)
    assert school.trainings == []
    assert school.learning.recorder.rows(WIDTH, "none") == 0
