# SPDX-License-Identifier: Apache-2.0
"""The trajectory log of real engines, against outputs and step maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine.cases import Case, expect, make_prompt
from engine.harness import Engine, params
from reference.checkpoints import write_checkpoint
from reference.llada import TinyLLaDA
from vllm.outputs import RequestOutput

from vllm_dlm import step_map
from vllm_dlm.trajectories import Trajectory, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def logging_engine(engines: Callable[..., Engine], folder: Path) -> Engine:
    """Canvases of 32, pages for three of them."""
    return engines(
        {"max_canvas": 32, "trajectory_dir": str(folder / "A")},
        max_model_len=128,
        num_gpu_blocks_override=13,
    )


def logged(folder: Path, outputs: list[RequestOutput]) -> list[Trajectory]:
    """The trajectories of requests that are finished."""
    found = {one.request.rpartition("-")[0]: one for one in read(folder)}
    return [found[output.request_id] for output in outputs]


def assert_agrees(output: RequestOutput, trajectory: Trajectory) -> None:
    """Last canvas, and the steps in which a token was written and changed."""
    assert trajectory.prompt == output.prompt_token_ids
    tokens, found = output.outputs[0].token_ids, step_map(output)
    mask, before = trajectory.mask, []
    last_write, edited = {}, set()
    for step in trajectory.steps():
        known = before + [mask] * (len(step.canvas) - len(before))
        differ = {i for i, token in enumerate(step.canvas) if token != known[i]}
        assert differ <= {*step.changed}
        for i in step.changed:
            if step.canvas[i] != mask:
                edited |= {i} & last_write.keys()
                last_write[i] = step.number
        before = step.canvas
    assert before[: len(tokens)] == list(tokens)
    assert [last_write[i] for i in range(len(tokens))] == found.steps
    assert [i in edited for i in range(len(tokens))] == found.edited
    behind = range(len(tokens), len(tokens) + len(found.beyond))
    assert [last_write.get(i, -1) for i in behind] == found.beyond


def test_full_attention(logging_engine: Engine, folder: Path, oracle: TinyLLaDA):
    """Preempted or not, also what rewrites; over several blocks and canvases."""
    rules = ("static/low_confidence", "threshold", "factor", "static/random")
    asks = {"step_map": True, "block_length": 16}
    cases = [
        Case(make_prompt(12 + i), rules[i % 4], max_tokens=60, ignore_eos=i > 3, seed=i)
        for i in range(8)
    ]
    sampling = [case.params() for case in cases]
    for one in sampling:
        one.extra_args["dlm"]["step_map"] = True
    sampling[6:] = [
        params(60, dlm=asks | {"strategy": "saber"}, ignore_eos=True) for _ in range(2)
    ]
    prompts = [case.prompt for case in cases]
    outputs, _ = logging_engine.run_short_of_pages(prompts, sampling)
    trajectories = logged(folder / "A", outputs)
    for output, trajectory in zip(outputs, trajectories, strict=True):
        assert_agrees(output, trajectory)
    assert any(any(step_map(output).edited) for output in outputs[6:])
    wanted = expect(cases[0], oracle, max_canvas=32)
    assert wanted.near_tie or step_map(outputs[0]).steps == wanted.written_at


@pytest.mark.slow
def test_blocks_with_seeds(
    engines: Callable[..., Engine],
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
):
    model = write_checkpoint(
        "fast_dllm_v2", tmp_path_factory.mktemp("b") / "Fast_dLLM_v2_7B", seed=2
    )
    engine = engines(
        {"block_length": 16, "trajectory_dir": str(folder / "B")},
        model=str(model),
        max_num_batched_tokens=64,
        num_gpu_blocks_override=13,
    )
    sampling = [
        params(70, dlm={"step_map": True}, ignore_eos=True, temperature=0.5, seed=i)
        for i in range(8)
    ]
    prompts = [make_prompt(length) for length in (9, 64, 71, 95, 96, 100, 130, 150)]
    outputs, _ = engine.run_short_of_pages(prompts, sampling)
    trajectories = logged(folder / "B", outputs)
    for output, trajectory in zip(outputs, trajectories, strict=True):
        assert_agrees(output, trajectory)


def test_steps_that_share_a_forward_have_lines_of_their_own(
    logging_engine: Engine, folder: Path
):
    """Drafts: steps of the log are those of the map, one token each."""
    dlm = {"strategy": "freedave", "block_length": 16, "step_map": True}
    prompts = [make_prompt(9 + i) for i in range(2)]
    sampling = [params(32, dlm=dlm, ignore_eos=True)] * 2
    outputs = logging_engine.outputs(prompts, sampling)
    trajectories = logged(folder / "A", outputs)
    for output, trajectory in zip(outputs, trajectories, strict=True):
        steps = list(trajectory.steps())
        assert all(len(step.changed) == 1 for step in steps)
        assert [step.number for step in steps] == list(range(32))
        number_of = {i: step.number for step in steps for i in step.changed}
        found = step_map(output).steps
        assert [number_of[i] for i in range(32)] == found
        metrics = output.outputs[0].spec_decode_metrics
        assert sum(metrics.histogram) < 32


def test_none_without_the_option(engine: Engine):
    assert "trajectory_log" not in engine.runner.sampler.observers


def test_what_a_request_writes_itself_is_there(logging_engine: Engine, folder: Path):
    """Also in blocks that are skipped, because they have no mask."""
    given = (7, None, *[8] * 20, None, None, 9)
    case = Case(make_prompt(9), max_tokens=len(given), block=8, canvas=given)
    (output,) = logging_engine.outputs([case.prompt], case.params())
    (trajectory,) = logged(folder / "A", [output])
    pins = {i: token for i, token in enumerate(given) if token is not None}
    assert trajectory.pins == pins
    *_, last = trajectory.steps()
    # Up to the last block with a mask: the last token is behind that.
    assert last.canvas == list(output.outputs[0].token_ids)[:-1]
    assert not pins.keys() & {i for one in trajectory.steps() for i in one.changed}
