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

from vllm_dlm.learn2pd import online, recorder, train
from vllm_dlm.learn2pd.recorder import Traces
from vllm_dlm.learn2pd.train import Report
from vllm_dlm.strategies.base import Decision, View
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
        patch.setattr(online, "FIRST_ROWS", 64)
        patch.setattr(recorder, "CAPACITY", 1024)
        patch.setattr(online, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(online, "get_tensor_model_parallel_world_size", lambda: ranks)
        patch.setattr(train, "train_filter", self._train)
        self.outcome = outcome
        self.rows = 0
        """Recorded so far."""
        self.trainings: list[int] = []
        """Rows recorded when each began."""
        self.batch = Batch(REQUESTS, WIDTH)
        server = SimpleNamespace(
            online_learning=True, record_traces=False, filters_path=lambda: folder
        )
        context = replace(
            CPU, model_key="no-such-model", options={"filter_dir": str(folder)}
        )
        facts: Any = SimpleNamespace(
            server=server,
            default_config=self.batch.config,
            context=lambda cache: context,
        )
        # Without a filter for ever, as if what is saved could not be read.
        self.strategy = Learn2PD(Learn2PDParams(), WIDTH, context)
        for slot in range(REQUESTS):
            self.batch.slots.strategies[slot] = self.strategy
        learning = online.open_learning(self.batch.slots, facts)
        assert learning is not None
        self.learning = learning
        self.reads_block = False
        """Whether the last request's decided positions are read."""

    def _train(self, traces: Traces, bound: float) -> tuple[Filter, Report]:
        self.trainings.append(self.rows)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return Filter.identity(WIDTH, 0.9), self.outcome

    def _step(self, view: View) -> None:
        decision: Any = Decision(commit=view.masked)
        self.learning.after_step(view, decision, view.candidate, self.batch.plan)

    def serve(self, steps: int) -> None:
        """New requests, and so many steps of them, each a whole block."""
        masked = torch.ones(REQUESTS, WIDTH, dtype=torch.bool)
        view = make_view(torch.rand(REQUESTS, WIDTH), masked)
        for slot in range(REQUESTS):
            self.reads_block = self.learning.add(slot)
        for _ in range(steps):
            self.rows = self.learning.recorder.rows(WIDTH, "none")
            self._step(view)
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
    assert school.strategy.is_current()
    assert school.reads_block


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_that_was_learned_is_the_last(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where requests to come do without it; nothing is recorded any more."""
    school = School(monkeypatch, tmp_path, GOOD, ranks=ranks)
    for _ in range(50):
        school.serve(steps=8)
    assert school.trainings == [64]
    assert school.learning.recorder.rows(WIDTH, "none") == 8 * REQUESTS
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert not school.reads_block
    # Requests to come are decided by a new object, which finds the file; but parallel
    # workers could not change over in one step.
    assert school.strategy.is_current() == (ranks > 1)


def test_further_workers_of_a_model_learn_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    school = School(monkeypatch, tmp_path, GOOD, rank=1, ranks=2)
    school.serve(steps=8)
    assert school.trainings == []
    assert school.learning.recorder.rows(WIDTH, "none") == 0
