# SPDX-License-Identifier: Apache-2.0
"""What is shown of a canvas, to who looks at every step and to who is slow."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from vllm_dlm.config.frames import MASK, NOT_READ, Frame
from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import DlmConfig
from vllm_dlm.config.request import resolve
from vllm_dlm.entrypoints.frame_streams import FrameForm, StreamWatcher, interleaved
from vllm_dlm.entrypoints.frames import Canvas, watch, watching
from vllm_dlm.messages import OptionError

STREAMED = SamplingParams(max_tokens=8, output_kind=RequestOutputKind.DELTA)


def frame(step: int, tokens: list[int], start: int = 0, **options: Any) -> Frame:
    known: dict[str, Any] = {"block": start // 4, "final": start, "end": 1000}
    known |= {"watched": 1, "step": step, "total": 4, "forward": start + step}
    known |= {"emitted": []}
    known |= {"confidence": [0.5] * len(tokens), **options}
    return Frame(start=start, tokens=tokens, **known)


def writes_of(canvas: Canvas) -> list[tuple[int, int | None]]:
    shown = canvas.show(0, 0)
    assert shown is not None
    return [(write.position, write.token) for write in shown.writes]


def test_only_changes_are_shown():
    canvas = Canvas()
    canvas.take(frame(0, [MASK, 7, MASK, MASK]), 0)
    assert writes_of(canvas) == [(1, 7)]
    assert canvas.show(0, 0) is None
    canvas.take(frame(1, [5, 7, MASK, MASK]), 0)
    canvas.take(frame(2, [5, MASK, MASK, 9]), 0)
    assert writes_of(canvas) == [(0, 5), (1, None), (3, 9)]
    canvas.take(frame(3, [5, 8, 6, 9]), 0)
    canvas.take(frame(0, [MASK, 3], start=4), 0)
    shown = canvas.show(0, 0)
    assert shown is not None
    assert [(w.position, w.token, w.step) for w in shown.writes] == [
        *((1, 8, 3), (2, 6, 3), (5, 3, 4))
    ]
    assert shown.tokens == [None, 3]
    assert shown.masked == [4]


def test_what_is_cut_off_is_gone():
    canvas = Canvas()
    canvas.take(frame(0, [1, 2, 3, 4], confidence=[NOT_READ] * 4), 0)
    first = canvas.show(0, 0)
    assert first is not None
    assert [write.confidence for write in first.writes] == [None] * 4
    canvas.take(frame(1, [1, 2], end=2), 0)
    assert writes_of(canvas) == [(2, None), (3, None)]


def test_a_replay_takes_nothing_back_that_was_handed_out():
    canvas = Canvas()
    canvas.take(frame(0, [1, MASK, 3, MASK]), 0)
    canvas.take(frame(1, [1, 2, 3, MASK], final=1), 0)
    assert len(writes_of(canvas)) == 3
    # Preempted: the block is masked again.
    canvas.take(frame(0, [1, MASK, MASK, MASK], final=2), 0)
    assert writes_of(canvas) == [(2, None)]


@pytest.mark.parametrize("seed", range(20))
def test_whoever_is_slow_ends_with_the_same_canvas(seed: int):
    source = random.Random(seed)
    often, seldom = Canvas(), Canvas()
    copies: list[dict[int, int | None]] = [{}, {}]
    for step in range(40):
        tokens = [source.choice((MASK, 1, 2, 3)) for _ in range(8)]
        made = frame(step, tokens, start=step // 10 * 4, final=0)
        for canvas, copy, is_shown in zip(
            (often, seldom), copies, (True, step % 7 == 4 or step == 39), strict=True
        ):
            canvas.take(made, 0)
            if is_shown:
                copy |= dict(writes_of(canvas))
    kept = [{at: t for at, t in copy.items() if t is not None} for copy in copies]
    assert kept[0] == kept[1]


def output(tokens: list[int]) -> RequestOutput:
    one = CompletionOutput(0, "", tokens, None, None)
    return RequestOutput("r", None, [], None, [one], finished=False)


def about_of(chunk: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(chunk.removeprefix("data: "))
    return data


def test_frames_between_chunks():
    """A frame waits for the tokens of earlier steps, and comes before its own."""

    async def check() -> None:
        watcher = StreamWatcher()
        assert not watcher
        watch = watcher.watches(STREAMED, "writes")
        assert watch is not None
        results: asyncio.Queue[RequestOutput | None] = asyncio.Queue()

        async def chunks() -> AsyncGenerator[str, None]:
            while (result := await results.get()) is not None:
                watcher.count(result)
                yield f"tokens {list(result.outputs[0].token_ids)}"
            yield "done"

        form = FrameForm({"id": "x"}, {"text": ""}, None, with_text=False)
        stream = interleaved(chunks(), watcher, form)
        watch.take(0, frame(0, [1, MASK, MASK, MASK]), 0)
        assert about_of(await anext(stream))["dlm"]["writes"] == [[0, 1, None, 0.5, 0]]
        # Two steps before the client looks again, with the first one's token.
        watch.take(0, frame(1, [1, 2, MASK, MASK]), 0)
        results.put_nowait(output([1]))
        watch.take(0, frame(2, [1, 2, 3, MASK], final=1), 1)
        assert await anext(stream) == "tokens [1]"
        late = about_of(await anext(stream))["dlm"]
        assert [write[:2] for write in late["writes"]] == [[1, 2], [2, 3]]
        results.put_nowait(None)
        assert await anext(stream) == "done"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(check())


def test_a_stream_that_is_closed_or_fails_closes_vllms():
    async def check() -> None:
        watcher, closed = StreamWatcher(), []
        form = FrameForm({}, {}, None, with_text=False)

        async def chunks(fails: bool) -> AsyncGenerator[str, None]:
            try:
                yield "first"
                if fails:
                    raise RuntimeError("of vLLM")
                await asyncio.Event().wait()
            finally:
                closed.append(fails)

        stream = interleaved(chunks(False), watcher, form)
        assert await anext(stream) == "first"
        waiting = asyncio.create_task(anext(stream))
        await asyncio.wait({waiting}, timeout=0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        stream = interleaved(chunks(True), watcher, form)
        assert await anext(stream) == "first"
        with pytest.raises(RuntimeError, match="of vLLM"):
            await anext(stream)
        assert closed == [False, True]

    asyncio.run(check())


def test_not_with_a_text_that_no_step_writes():
    """`tccf` writes its check text itself; a server's own setting is for the others."""
    options = {"frames": "text", "tccf": {"trigger": [5], "check": [6]}}
    server = DlmConfig.from_mapping(options, where="server")
    model = ModelDefaults("threshold", 8, 9, attention="block")
    config = resolve(server, None, model)
    with watching(StreamWatcher()):
        assert watch(config, STREAMED) is None
        asks = SamplingParams(
            extra_args={"dlm_frames": "text"}, output_kind=RequestOutputKind.DELTA
        )
        with pytest.raises(OptionError, match="dlm_frames: frames cannot be combined"):
            watch(config, asks)


def test_who_is_not_streamed_is_not_watched():
    watcher = StreamWatcher()
    assert watcher.watches(SamplingParams(max_tokens=8), "text") is None
    assert watcher.watches(STREAMED, "off") is None
    assert not watcher
