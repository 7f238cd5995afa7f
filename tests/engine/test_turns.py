# SPDX-License-Identifier: Apache-2.0
"""Who goes first where a forward does not hold the rows of all; counted in steps."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.harness import Engine, params
from vllm.v1.core.sched.scheduler import Scheduler

BUDGET = 128
"""Rows of a forward of these engines, which is also their context; a canvas has 32."""


@pytest.fixture(params=["as it is", "0.33"])
def waiting_loop(
    request: pytest.FixtureRequest, busy_engine: Engine, monkeypatch
) -> None:
    """vLLM stops at a waiting request that gets no rows, or tries the next one."""
    if request.param == "as it is":
        return
    # Without it vLLM itself stops at what does not fit whole: not our doing.
    config = busy_engine.scheduler.scheduler_config
    monkeypatch.setattr(config, "enable_chunked_prefill", True)
    source = inspect.getsource(Scheduler.schedule)
    stops = "# The request cannot be scheduled.\n" + 24 * " " + "break\n"
    tries_next = "skip_request(request_queue)\n" + 24 * " " + "continue\n"
    if stops in source:
        assert source.count(stops) == 1
        source = source.replace(stops, tries_next)
        scope = dict(Scheduler.schedule.__globals__)
        exec(textwrap.dedent(source), scope)
        monkeypatch.setattr(Scheduler, "schedule", scope["schedule"])
    # Newer ones do so by themselves.
    assert tries_next in source


@dataclass
class Traffic:
    """Steps an engine, and notes in which steps each request was computed."""

    engine: Engine
    steps: int = 0
    ran: dict[str, list[int]] = field(default_factory=dict)
    preempted: list[tuple[str, list[str]]] = field(default_factory=list)
    """Who lost its pages, and who went on; in the order of arrival."""

    # One token a step: a request takes part in as many steps as it has tokens.
    def add(self, prompt: int, tokens: int, block: int = 1) -> str:
        dlm = {"strategy": "static", "block_length": block}
        sampling = params(tokens, dlm=dlm, ignore_eos=True)
        name = self.engine.add(make_prompt(prompt, self.steps), sampling)
        self.ran[name] = []
        return name

    def step(self) -> None:
        scheduler = self.engine.scheduler
        before = {name_of(r): r.num_preemptions for r in scheduler.running}
        schedule = scheduler.schedule

        def scheduled(*args, **kwargs):
            output = schedule(*args, **kwargs)
            for request_id in output.num_scheduled_tokens:
                self.ran[request_id.rpartition("-")[0]].append(self.steps)
            for request in scheduler.waiting:
                if before.get(name_of(request), 99) < request.num_preemptions:
                    running = [name_of(r) for r in scheduler.running]
                    self.preempted.append((name_of(request), running))
            return output

        scheduler.schedule = scheduled
        try:
            self.engine.step()
        finally:
            del scheduler.schedule
        self.steps += 1

    def keep_waiting(self, count: int, prompt: int, tokens: int) -> None:
        """Let there always be so many requests that wait, of different lengths."""
        while len(self.engine.scheduler.waiting) < count:
            self.add(prompt, tokens - len(self.ran) % 5)

    def forwards_left(self) -> int:
        """Of the requests that run: one for each token."""
        return sum(
            request.max_tokens - request.num_output_tokens
            for request in self.engine.scheduler.running
        )

    def stop(self) -> None:
        for name in self.ran:
            self.engine.abort(name)
        self.engine.flush()


def name_of(request) -> str:
    return request.request_id.rpartition("-")[0]


@pytest.fixture
def traffic(busy_engine: Engine):
    traffic = Traffic(busy_engine)
    yield traffic
    traffic.stop()


def assert_turns_are_taken(traffic: Traffic) -> None:
    """Who has begun sits out fewer steps in a row than requests may run."""
    seats = traffic.engine.scheduler.max_num_running_reqs
    for name, steps in traffic.ran.items():
        gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
        assert max(gaps, default=0) <= seats, (name, steps)


def await_first_step(
    traffic: Traffic, name: str, stream: Callable[[], None]
) -> tuple[int, int]:
    """Steps until a request that comes now is computed, and how many are allowed."""
    begin, allowed = traffic.steps, traffic.forwards_left() + 1
    while not traffic.ran[name] and traffic.steps - begin < allowed:
        stream()
        traffic.step()
    return traffic.steps - begin, allowed


@pytest.mark.usefixtures("waiting_loop")
def test_small_requests_do_not_overtake_a_large_one(traffic: Traffic):
    """It waits for those that ran when it came, and for no other."""

    def stream() -> None:
        traffic.keep_waiting(4, prompt=4, tokens=11)

    for _ in range(9):
        stream()
        traffic.step()
    for request in list(traffic.engine.scheduler.waiting):
        traffic.engine.abort(name_of(request))
    large = traffic.add(prompt=90, tokens=32)
    taken, allowed = await_first_step(traffic, large, stream)
    assert traffic.ran[large], f"not computed in {allowed} steps"
    assert taken <= 12  # those that ran write up to 11 tokens each, side by side


@pytest.mark.usefixtures("waiting_loop")
def test_a_large_request_goes_on_among_small_ones(traffic: Traffic):
    """Together they fit at first, not with their second canvases."""
    large = traffic.add(prompt=56, tokens=64)
    while len(traffic.ran[large]) < 64:
        traffic.keep_waiting(4, prompt=8, tokens=60)
        traffic.step()
        assert traffic.steps <= 32 + 32 * 8
    assert traffic.steps > 64  # it had to sit out
    assert_turns_are_taken(traffic)


@pytest.mark.usefixtures("waiting_loop")
def test_small_requests_go_on_among_large_ones(traffic: Traffic):
    small = []
    for number in range(3):
        traffic.keep_waiting(1, prompt=56, tokens=64)
        small.append(traffic.add(prompt=8, tokens=8 + number))
        traffic.step()
    while any(len(traffic.ran[one]) < 8 + n for n, one in enumerate(small)):
        traffic.keep_waiting(1, prompt=56, tokens=64)
        traffic.step()
        # Each waits for those that came before it.
        assert traffic.steps <= 3 * 64 + 8 + 9 + 10
    assert_turns_are_taken(traffic)


def test_a_small_request_takes_turns_with_one_that_fills_a_forward(traffic: Traffic):
    """No forward holds both: without turns it would wait until the large one ends."""
    large = traffic.add(prompt=90, tokens=32)
    for _ in range(4):
        traffic.step()
    came = traffic.steps
    small = traffic.add(prompt=4, tokens=11)
    while traffic.engine.busy:
        traffic.step()
    assert traffic.ran[small][0] <= came + 1
    assert traffic.ran[small][-1] <= came + 2 * 11
    assert len(traffic.ran[large]) == 32
    assert traffic.ran[large][-1] == 32 + 11 - 1  # each step computes one of the two
    assert_turns_are_taken(traffic)


def test_small_requests_that_go_on_coming_leave_half_the_steps(traffic: Traffic):
    """To a large one that fills a forward."""
    large = traffic.add(prompt=90, tokens=32)
    traffic.step()
    while len(traffic.ran[large]) < 32:
        traffic.keep_waiting(3, prompt=4, tokens=7)
        traffic.step()
        assert traffic.steps <= 2 * 32 + 1
    assert len(traffic.ran) > 8
    assert_turns_are_taken(traffic)


def test_nobody_is_admitted_early_where_forwards_are_full_of_small_ones(
    traffic: Traffic,
):
    """Three fit at a time. A fourth would only make the others slower."""
    for _ in range(40):
        traffic.keep_waiting(4, prompt=28, tokens=12)
        traffic.step()
        assert len(traffic.engine.scheduler.running) <= 3
    assert all(
        steps == list(range(steps[0], steps[0] + len(steps)))
        for steps in traffic.ran.values()
        if steps
    )


@pytest.mark.parametrize("prompt", [200, 230])
def test_a_long_prompt_in_chunks_leaves_rows_to_small_ones(
    engines: Callable[..., Engine], tmp_path_factory, prompt: int
):
    """Of a model with block attention: 16 rows a block, 64 rows a forward."""
    sdar = BlockEngines(engines, tmp_path_factory.mktemp("sdar"), "SDAR-4B-Chat-b16")
    traffic = Traffic(sdar(max_num_batched_tokens=64))
    long = traffic.add(prompt, tokens=8, block=BLOCK)
    traffic.step()
    assert len(traffic.engine.scheduler.running) == 1
    came = traffic.steps
    small = [traffic.add(8, tokens=8, block=BLOCK) for _ in range(2)]
    while traffic.engine.busy:
        traffic.step()
    assert traffic.ran[small[0]][0] == came
    assert traffic.ran[small[1]][0] <= came + 2
    # The long prompt goes on in the same forwards, by what is left of them.
    chunks = -(-prompt // 32)
    assert traffic.ran[long] == list(range(len(traffic.ran[long])))
    assert len(traffic.ran[long]) <= chunks + 8 + 8
    traffic.stop()


def test_pages_are_taken_from_who_came_last(engines: Callable[..., Engine]):
    """Six pages, of which the large request has four with its second canvas.

    From then on it takes turns with a small one, whose second canvas needs a third. The
    large one writes a block of 32, which it would begin anew.
    """
    traffic = Traffic(
        engines(
            dlm={"max_canvas": 32},
            max_model_len=BUDGET,
            num_gpu_blocks_override=7,
            max_num_batched_tokens=BUDGET,
        )
    )
    large = traffic.add(prompt=56, tokens=64, block=32)
    for _ in range(10):
        traffic.step()
    while len(traffic.ran[large]) < 64:
        traffic.keep_waiting(2, prompt=8, tokens=60)
        traffic.step()
        assert traffic.steps <= 32 + 2 * 32
    assert traffic.preempted
    arrived = {name: number for number, name in enumerate(traffic.ran)}
    for loser, winners in traffic.preempted:
        assert all(arrived[winner] < arrived[loser] for winner in winners)
    traffic.stop()
