# SPDX-License-Identifier: Apache-2.0
"""Many strategies in one batch: each request as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
from engine.cases import RULES, Case, make_prompt
from engine.harness import Engine, params
from tiers import fast
from vllm import SamplingParams

from vllm_dlm.model_executor.sampling.groups import MOST_IDLE_GROUPS, Group
from vllm_dlm.strategies.base import Decision, View
from vllm_dlm.strategies.threshold import Threshold

Request = tuple[tuple[int, ...], SamplingParams]


def make_request(number: int, rule: str) -> Request:
    case = Case(
        make_prompt(3 + 5 * number % 40, number),
        rule=rule,
        block=(8, 16, 32)[number % 3],
        max_tokens=20 + number % 13,
        ignore_eos=True,
        seed=number,
    )
    more = {"temperature": 0.9} if number % 4 == 3 else {}
    return case.prompt, case.params(**more)


def one_per_strategy() -> dict[str, str]:
    """Strategy -> one of its rules."""
    return {rule.partition("/")[0]: rule for rule in reversed(RULES)}


@pytest.mark.parametrize("first", fast(0, of=range(0, len(one_per_strategy()), 8)))
def test_sixteen_requests_of_eight_strategies(wide_engine: Engine, first: int):
    rules = sorted(one_per_strategy().values())
    chosen = (rules[first:] + rules)[:8]
    requests = [make_request(i, chosen[i % 8]) for i in range(16)]
    prompts, sampling = zip(*requests, strict=True)
    together = wide_engine.run(prompts, sampling)
    alone = [wide_engine.run([prompt], one)[0] for prompt, one in requests[:8]]
    assert [(r.tokens, r.forwards) for r in together[:8]] == [
        (r.tokens, r.forwards) for r in alone
    ]


@pytest.mark.parametrize(
    "rule",
    # One that remembers its steps, one that rewrites, one that reads a filter.
    fast(
        *(one_per_strategy()[name] for name in ("klass", "joint", "learn2pd")),
        of=sorted(one_per_strategy().values()),
    ),
)
def test_a_recycled_slot_remembers_nothing(small_engine: Engine, rule: str):
    """Requests that end in the middle of a block leave their slots to others."""
    prompt, sampling = make_request(1, rule)
    fresh = small_engine.run([prompt], sampling)[0]
    for steps in (1, 2, 5):
        prompts = [make_prompt(9, seed) for seed in range(3)]
        ids = [small_engine.add(one, make_request(1, rule)[1]) for one in prompts]
        for _ in range(steps):
            small_engine.step()
        for request_id in ids:
            small_engine.abort(request_id)
        small_engine.flush()
        again = small_engine.run([prompt], sampling)[0]
        assert (again.tokens, again.forwards) == (fresh.tokens, fresh.forwards)


@pytest.mark.slow
def test_strategies_that_nobody_uses_are_dropped(wide_engine: Engine):
    """Each block length makes a group of its own."""
    sampling = [
        params(2, dlm={"strategy": "threshold", "block_length": length})
        for length in range(1, MOST_IDLE_GROUPS + 21)
    ]
    wide_engine.run([make_prompt(3)] * len(sampling), sampling)
    wide_engine.flush()
    groups = wide_engine.runner.sampler.groups
    assert MOST_IDLE_GROUPS <= len(groups._groups) <= MOST_IDLE_GROUPS + 1


def test_strategies_remember_the_requests_that_run_only(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """Not a slot for each request there might be, in a group per block length.

    Where their memory is larger than these tests' is.
    """
    monkeypatch.setattr("vllm_dlm.model_executor.sampling.groups.KEPT_BYTES", 0)
    groups = wide_engine.runner.sampler.groups

    def remembered() -> int:
        return sum(group.num_bytes for group in groups._groups.values())

    wide_engine.flush()
    for group in groups._groups.values():
        # What earlier tests have left.
        group.admit(0, forget=False)
        group.dismiss(0)
    assert remembered() == 0
    sampling = [
        params(64, dlm={"strategy": "klass", "block_length": length}, ignore_eos=True)
        for length in range(8, 13)
    ]
    ids = [
        wide_engine.add(make_prompt(3, length), sampling[length % 5])
        for length in range(10)
    ]
    wide_engine.step()
    # Two requests a group.
    alike = [Group(group.strategy, 0) for group in set(groups._group_of.values())]
    for group in alike:
        assert [group.admit(slot, forget=False) for slot in range(2)] == [1, 2]
        # Theirs, and the dummy slot's.
        assert all(len(memory) == 3 for memory in group.memory.values())
    assert len(alike) == 5
    assert remembered() == sum(group.num_bytes for group in alike) > 0
    for request_id in ids:
        wide_engine.abort(request_id)
    wide_engine.flush()
    assert remembered() == 0


def test_who_comes_later_is_decided_by_what_is_current(
    wide_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    """As when a filter is learned meanwhile: who is running keeps the old object."""
    dlm = {"strategy": "threshold", "block_length": 16}
    prompts = [make_prompt(9 + i) for i in range(2)]
    sampling = params(32, dlm=dlm, ignore_eos=True)
    expected = wide_engine.run(prompts, sampling)
    deciding: list[set[Threshold]] = []
    select = Threshold.select

    def noted(self: Threshold, view: View, numbers: Any) -> Decision:
        deciding[-1].add(self)
        return select(self, view, numbers)

    monkeypatch.setattr(Threshold, "select", noted)
    ids = []
    for prompt in prompts:
        ids.append(wide_engine.add(prompt, sampling))
        deciding.append(set())
        wide_engine.step()
        monkeypatch.setattr(Threshold, "is_current", lambda self: False)
    done = {}
    while wide_engine.busy:
        done |= {one.request_id: one for one in wide_engine.step() if one.finished}
    assert [len(objects) for objects in deciding] == [1, 2]
    assert deciding[0] < deciding[1]
    found = [list(done[name].outputs[0].token_ids) for name in ids]
    assert found == [one.tokens for one in expected]
