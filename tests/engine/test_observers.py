# SPDX-License-Identifier: Apache-2.0
"""An observer from another package, on real engines: what it is told, and when."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from engine.cases import make_prompt
from engine.harness import Engine, params
from engine.test_no_waits import Waits
from tiers import fast
from vllm.outputs import RequestOutput

from vllm_dlm.learn2pd.oracle import register_oracle
from vllm_dlm.learn2pd.recorder import IGNORED, RIGHT
from vllm_dlm.model_executor.facts import EngineFacts
from vllm_dlm.model_executor.host_slots import BLOCK, OPEN_MASKS, ToHost
from vllm_dlm.model_executor.planning.block_rows import BlockRows
from vllm_dlm.model_executor.sampling.observers import OBSERVERS, Observer
from vllm_dlm.model_executor.sampling.safety import SafeDecision
from vllm_dlm.model_executor.slots import RequestSlots
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import View

KEY = "transcript_of_tests"


class Transcript(Observer):
    """All that it is told, and what it could read then."""

    def __init__(self, slots: RequestSlots, reads_block: bool) -> None:
        self.slots = slots
        self.reads_block = reads_block
        self.slot = -1
        """Of the last request that was added."""
        self.calls: list[tuple[str, str]] = []
        """("add" | "after_step" | "remove", request)."""
        self.steps: dict[str, list[list[tuple[int, int]]]] = {}
        """Request -> of each step, output positions of its block and their tokens."""
        self.kept: list[tuple[torch.Tensor, ...]] = []
        """Of each call, the step by the view and by the request table, the tokens as
        they are handed over, the table's tokens and masks."""
        self.measured: list[torch.Tensor] = []
        """Of each call, which positions have a confidence."""
        self._arriving: tuple[list[str], np.ndarray, ToHost] | None = None

    def add(self, slot: int) -> bool:
        self.slot = slot
        request = self.slots.requests[slot].id
        self.calls.append(("add", request))
        self.steps.setdefault(request, [])
        return self.reads_block

    def after_step(
        self,
        view: View,
        decision: SafeDecision,
        written: torch.Tensor,
        rows: BlockRows,
    ) -> None:
        self._receive()
        requests = [self.slots.requests[slot].id for slot in rows.slots_np.tolist()]
        self.calls += [("after_step", request) for request in requests]
        starts = self.slots.host.block_start - self.slots.host.prompt_len
        self._arriving = requests, starts[rows.slots_np], ToHost(written)
        blocks = rows.blocks
        cells = blocks.slots[:, None], blocks.positions
        self.kept.append(
            (
                view.step,
                self.slots.step[blocks.slots],
                written,
                self.slots.tokens[cells],
                self.slots.masked[cells],
            )
        )
        self.measured.append(view.confidence > 0)

    def remove(self, slot: int) -> None:
        self._receive()
        self.calls.append(("remove", self.slots.requests[slot].id))

    def _receive(self) -> None:
        if self._arriving is None:
            return
        (requests, starts, sent), self._arriving = self._arriving, None
        for request, start, tokens in zip(
            requests, starts.tolist(), sent.numpy().tolist(), strict=True
        ):
            places = enumerate(tokens, start)
            self.steps[request].append(
                [(i, token) for i, token in places if token >= 0]
            )


def open_transcript(slots: RequestSlots, facts: EngineFacts) -> Transcript | None:
    wanted = facts.additional_config.get(KEY)
    return None if wanted is None else Transcript(slots, wanted == "block")


@pytest.fixture(scope="module")
def observed(engines: Callable[..., Engine]) -> Callable[[str], Engine]:
    """`observed("block" | "masks")`: an engine with canvases of 32, and pages for three
    of them, whose observer reads the logits of these positions."""

    def engine(reads: str) -> Engine:
        dlm = {"online_learning": False, "max_canvas": 32}
        # Engines of other tests do not know of it.
        with patch.dict(OBSERVERS._targets), patch.dict(OBSERVERS._loaded):
            OBSERVERS.register(KEY, open_transcript)
            return engines(
                additional_config={"dlm": dlm, KEY: reads},
                max_model_len=128,
                num_gpu_blocks_override=13,
            )

    return engine


def transcript_of(engine: Engine) -> Transcript:
    transcript = engine.runner.sampler.observers[KEY]
    assert isinstance(transcript, Transcript)
    return transcript


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Finished outputs by the engine's own ids of their requests."""
    done = {}
    while engine.busy:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
    engine.flush()
    return done


def own_names(transcript: Transcript) -> dict[str, str]:
    """Ids that `Engine.add` returned -> the engine's own ids."""
    return {request.rpartition("-")[0]: request for request in transcript.steps}


@pytest.mark.parametrize("strategy", fast("saber", of=("static", "threshold", "saber")))
def test_what_was_written_adds_up_to_the_answer(
    observed: Callable[[str], Engine], strategy: str
):
    """Also of preempted requests: they are removed, and added again."""
    engine = observed("masks")
    transcript = transcript_of(engine)
    dlm = {"strategy": strategy, "block_length": 16}
    sampling = params(60, dlm=dlm, ignore_eos=True)
    ids = [engine.add(make_prompt(12 + i), sampling) for i in range(8)]
    done = finish(engine)
    own_name, added = own_names(transcript), 0
    for name in ids:
        request, tokens = own_name[name], list(done[name].outputs[0].token_ids)
        canvas = {i: token for step in transcript.steps[request] for i, token in step}
        assert [canvas[i] for i in range(len(tokens))] == tokens
        told = [call for call, of in transcript.calls if of == request]
        assert told[0] == "add" and told[1] == "after_step" and told[-1] == "remove"
        assert told.count("after_step") == len(transcript.steps[request])
        assert told.count("add") == told.count("remove")
        added += told.count("add")
    assert added > len(ids)


def test_a_step_is_told_before_the_request_goes_on(observed: Callable[[str], Engine]):
    """Tokens and masks are those after the step, its number is what it began with."""
    engine = observed("masks")
    transcript = transcript_of(engine)
    transcript.kept.clear()
    dlm = {"strategy": "static", "block_length": 16}
    engine.run([make_prompt(12)], params(48, dlm=dlm, ignore_eos=True))
    steps = [step for step, *_ in transcript.kept]
    assert [int(step) for step in steps] == [*range(16)] * 3
    for step, counted, written, tokens, masked in transcript.kept:
        assert torch.equal(step, counted)
        assert torch.equal(written < 0, masked)
        assert torch.equal(written[~masked], tokens[~masked])


def test_decided_positions_are_measured_for_who_asks(
    observed: Callable[[str], Engine],
):
    dlm = {"strategy": "static", "block_length": 16}
    measured = {}
    for reads, rows in (("masks", OPEN_MASKS), ("block", BLOCK)):
        engine = observed(reads)
        transcript = transcript_of(engine)
        transcript.measured.clear()
        engine.add(make_prompt(12), params(16, dlm=dlm, ignore_eos=True))
        engine.step()
        assert engine.runner.model_state.slots.host.reads[transcript.slot] == rows
        finish(engine)
        measured[reads] = transcript.measured
    numbers = {
        reads: [int(step.sum()) for step in steps] for reads, steps in measured.items()
    }
    assert numbers == {"masks": [*range(16, 0, -1)], "block": [16] * 16}


def test_an_observer_need_not_wait_for_the_device(observed: Callable[[str], Engine]):
    engine = observed("block")
    transcript = transcript_of(engine)
    engine.add(make_prompt(12), params(40, dlm={"block_length": 16}))
    engine.step()
    told = len(transcript.calls)
    with Waits() as waits:
        for _ in range(6):
            engine.step()
    assert len(transcript.calls) == told + 6
    assert not waits.seen
    finish(engine)


def test_none_is_made_where_nobody_asks(engine: Engine):
    assert engine.runner.sampler.observers == {}


def test_the_steps_of_a_block_are_labelled_by_its_own_end(
    engines: Callable[..., Engine],
):
    """One token a step: in the n-th step n positions are decided, and one is right."""
    engine = engines({"record_traces": True, "block_length": 8})
    recorder = engine.runner.sampler.observers["learn2pd"].recorder
    engine.run([make_prompt(12)], params(24, ignore_eos=True))
    engine.flush()
    traces = recorder.traces(8, "none")
    assert np.unique(traces.block, return_counts=True)[1].tolist() == [8, 8, 8]
    decided = (traces.label == IGNORED).sum(axis=1)
    assert decided.tolist() == [*range(8)] * 3
    assert (traces.label == RIGHT).any(axis=1).all()


def test_the_oracle_writes_the_same_text_in_fewer_steps(
    engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
):
    """It knows what `static` wrote; its steps are recorded, and those alone."""
    engine = engines({"record_traces": True, "block_length": 8})
    recorder = engine.runner.sampler.observers["learn2pd"].recorder
    monkeypatch.setattr(STRATEGIES, "_targets", dict(STRATEGIES._targets))
    prompts = [make_prompt(12), make_prompt(7)]
    wanted = engine.run(prompts, params(24, ignore_eos=True))
    recorder.clear()
    name = register_oracle()
    asked = [
        params(
            24,
            ignore_eos=True,
            dlm={"strategy": name, "strategy_config": {"answer": one.tokens}},
        )
        for one in wanted
    ]
    got = engine.run(prompts, asked)
    engine.flush()
    assert [one.tokens for one in got] == [one.tokens for one in wanted]
    assert all(
        few.forwards < many.forwards for few, many in zip(got, wanted, strict=True)
    )
    traces = recorder.traces(8, "none")
    assert len(traces) == sum(one.forwards for one in got)
    assert len(np.unique(traces.block)) == 6
