# SPDX-License-Identifier: Apache-2.0
"""Frames of real engines: what was written when, against outputs and step maps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engine.cases import MASK_ID, RULES, Case, make_prompt
from engine.families import BLOCK_CAUSAL, CAUSAL_CONTEXT, Served, names, serving
from engine.harness import Engine, params
from engine.test_no_waits import Waits
from tiers import fast
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput

from vllm_dlm import step_map
from vllm_dlm.entrypoints.frames import CanvasFrame, FrameCalls, Write, watching


class Replay:
    """What frames say of the samples of some requests, in the order of admission."""

    def __init__(self) -> None:
        self.watcher = FrameCalls(self.note)
        self.frames: dict[tuple[int, int], list[CanvasFrame]] = defaultdict(list)

    def note(self, frame: CanvasFrame) -> None:
        self.frames[frame.prompt, frame.sample].append(frame)

    def writes(self, request: int = 0, sample: int = 0) -> dict[int, list[Write]]:
        """Position -> what was written there, in order."""
        found: dict[int, list[Write]] = defaultdict(list)
        for frame in self.frames[request, sample]:
            assert frame.canvas_end >= frame.end or not frame.tokens
            for write in frame.writes:
                found[write.position].append(write)
        return found

    def check(
        self, output: CompletionOutput, request: int = 0, *, joined: bool = False
    ) -> None:
        """Writes in their order give the output's tokens, in the steps of its map.

        Args:
            joined: forwards may do several steps, which a step map counts one by one.
        """
        writes = self.writes(request, output.index)
        last = [writes[i][-1] for i in range(len(output.token_ids))]
        assert [write.token for write in last] == list(output.token_ids)
        if output.routed_experts is not None and not joined:
            assert [write.step for write in last] == step_map(output).steps
        frames = self.frames[request, output.index]
        assert [frame.final for frame in frames] == sorted(
            frame.final for frame in frames
        )
        for frame in frames:
            assert len(frame.tokens) == frame.end - frame.start


@contextmanager
def watched() -> Iterator[Replay]:
    replay = Replay()
    with watching(replay.watcher):
        yield replay


def requests_of_every_rule(every: int = 1) -> list[tuple[Any, Any]]:
    made = []
    for number, rule in list(enumerate(RULES))[::every]:
        case = Case(
            make_prompt(3 + 7 * number % 40, number),
            rule=rule,
            cache=("none", "dual", "window")[number % 3],
            block=(8, 16, 32)[number % 3],
            max_tokens=32 - number % 9,
            ignore_eos=number % 2 == 0,
            seed=number,
        )
        sampling = case.params(**({"temperature": 0.9} if number % 4 == 3 else {}))
        sampling.extra_args["dlm"]["step_map"] = True
        made.append((case.prompt, sampling))
    return made


EVERY = pytest.mark.parametrize("every", fast(6, of=(6, 1)))
"""Each rule, or every sixth."""


@EVERY
def test_every_rule(engine: Engine, every: int):
    requests = requests_of_every_rule(every)
    wanted = engine.outputs(*zip(*requests, strict=True))
    with watched() as replay:
        outputs = engine.outputs(*zip(*requests, strict=True))
    for number, (output, other) in enumerate(zip(outputs, wanted, strict=True)):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        replay.check(output.outputs[0], number)
        steps = [frame.forward for frame in replay.frames[number, 0]]
        assert steps == [*range(len(steps))]


def test_edits_cuts_and_drafts(engine: Engine):
    """Positions that are masked again or overwritten; canvases that are cut; several
    steps in a forward."""
    asks: list[dict[str, Any]] = [
        {"strategy": "saber"},
        {"strategy": "hierarchy", "eotp": "block"},
        {"strategy": "threshold", "eotp": "token", "eotp_threshold": 0.05},
        {"strategy": "freedave"},
    ]
    prompts = [make_prompt(9 + i) for i in range(4)]
    sampling = [
        params(60, dlm=dlm | {"block_length": 16, "step_map": True}, ignore_eos=i != 2)
        for i, dlm in enumerate(asks)
    ]
    with watched() as replay:
        outputs = engine.outputs(prompts, sampling)
    for number, output in enumerate(outputs):
        replay.check(output.outputs[0], number, joined=number == 3)
    assert any(len(found) > 1 for found in replay.writes(0).values())
    # The canvas had 64 positions.
    end = replay.frames[2, 0][-1].canvas_end
    assert len(outputs[2].outputs[0].token_ids) <= end < 60


def test_samples(engine: Engine):
    sampling = params(
        40, n=2, temperature=1.0, seed=7, dlm={"step_map": True}, ignore_eos=True
    )
    with watched() as replay:
        (output,) = engine.outputs([make_prompt(12)], sampling)
    assert {*replay.frames} == {(0, 0), (0, 1)}
    for one in output.outputs:
        replay.check(one)
    assert output.outputs[0].token_ids != output.outputs[1].token_ids


def test_what_the_request_brings_itself(engine: Engine):
    """Blocks without a hole, of which no forward decides anything, are there too."""
    text = list(make_prompt(16, 3))
    holes = [*text[:8], *[MASK_ID] * 4, *text[8:12], *text[:8], *[MASK_ID] * 8, *text]
    asks: list[dict[str, Any]] = [
        {"canvas": holes},
        {"suffix": text},
        {"canvas": holes},
    ]
    asks[2]["holes"] = "shrink"
    sampling = [
        params(len(holes) if "canvas" in dlm else 24, dlm={"block_length": 8} | dlm)
        for dlm in asks
    ]
    with watched() as replay:
        outputs = engine.outputs([make_prompt(7)] * 3, sampling)
    replay.check(outputs[0].outputs[0], 0)
    replay.check(outputs[1].outputs[0], 1)
    # What holes have shrunk by is on the canvas, and not in the answer.
    canvas = [replay.writes(2)[i][-1].token for i in range(len(holes))]
    for brought, token in zip(holes, canvas, strict=True):
        assert brought in (MASK_ID, token)


@pytest.mark.slow
def test_preempted(engine: Engine):
    """What was handed out is never masked again; the rest of the block is."""
    requests = requests_of_every_rule()[:4]
    with watched() as replay:
        names = [engine.add(*request) for request in requests]

    def meddle(step: int) -> None:
        if step in (2, 5, 9):
            for request in list(engine.scheduler.running):
                engine.preempt(request.request_id)

    done = engine.drive(meddle)
    wanted = engine.outputs(*zip(*requests, strict=True))
    began_again = 0
    for number, (name, other) in enumerate(zip(names, wanted, strict=True)):
        output = done[name].outputs[0]
        assert output.token_ids == other.outputs[0].token_ids
        replay.check(output, number)
        final = 0
        for frame in replay.frames[number, 0]:
            final = max(final, frame.final)
            for write in frame.writes:
                assert write.token is not None or write.position >= final
        steps = [frame.forward for frame in replay.frames[number, 0]]
        began_again += steps != [*range(len(steps))]
    assert began_again >= 2


@EVERY
def test_asynchronous(engines: Callable[..., Engine], engine: Engine, every: int):
    ahead = engines(async_scheduling=True)
    requests = requests_of_every_rule(every)
    for _, sampling in requests:
        # Who asks for a map does not run ahead.
        del sampling.extra_args["dlm"]["step_map"]
    wanted = engine.outputs(*zip(*requests, strict=True))
    with watched() as replay:
        outputs = ahead.outputs(*zip(*requests, strict=True))
    for number, (output, other) in enumerate(zip(outputs, wanted, strict=True)):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        replay.check(output.outputs[0], number)


def test_nothing_waits_for_the_device(engine: Engine):
    with watched() as replay:
        for prompt, sampling in requests_of_every_rule()[:4]:
            del sampling.extra_args["dlm"]["step_map"]
            engine.add(prompt, sampling)
        engine.step()
        with Waits() as waits:
            for _ in range(3):
                engine.step()
        while engine.busy:
            engine.step()
    assert not waits.seen
    assert replay.frames


def test_who_is_not_watched_has_none(engine: Engine):
    """Beside one that is watched, in the same group too."""
    case = Case(make_prompt(9), max_tokens=20)
    with watched() as replay:
        name = engine.add(case.prompt, case.params())
    engine.add(make_prompt(11), case.params())
    outputs = engine.drive(lambda step: None)
    assert {*replay.frames} == {(0, 0)}
    replay.check(outputs[name].outputs[0])


def test_nobody_to_show_them_to(engine: Engine):
    with pytest.raises(VLLMValidationError, match="frames come with streams"):
        engine.add([1, 2], params(4, dlm={"frames": "text"}))
    engine.add([1, 2], params(4, dlm={"frames": "off"}))
    engine.drive(lambda step: None)


FAMILIES = tuple(
    served
    for served in BLOCK_CAUSAL + CAUSAL_CONTEXT
    if served.folder
    in {
        "SDAR-4B-Chat-b16",
        "Fast_dLLM_v2_1.5B",
        "LLaDA2.2-mini",
        "Nemotron-Labs-Diffusion-8B",
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("served", FAMILIES, ids=names(FAMILIES))
def test_block_by_block(
    engines: Callable[..., Engine],
    tmp_path_factory: pytest.TempPathFactory,
    served: Served,
):
    """Leads, seeds, edits that move text, and what is decided ahead; short of pages."""
    serve = serving(engines, tmp_path_factory.mktemp("watched"))
    engine, _ = serve(served, max_num_batched_tokens=64, num_gpu_blocks_override=13)
    edits_text = served.family == "llada2_2"
    asks: list[dict[str, Any]] = [{}] if edits_text else [{}, {"step_map": True}]
    if served.family == "nemotron":
        asks.append({"strategy": "linear_spec"})
    if served.family == "sdar":
        asks.append({"strategy": "freedave", "strategy_config": {"eager": True}})
    sampling = [
        params(70, dlm=asks[i % len(asks)], ignore_eos=True, seed=i) for i in range(8)
    ]
    prompts = [make_prompt(length) for length in (9, 64, 71, 95, 96, 100, 130, 150)]
    with watched() as replay:
        outputs, _ = engine.run_short_of_pages(prompts, sampling)
    for number, output in enumerate(outputs):
        replay.check(output.outputs[0], number)
