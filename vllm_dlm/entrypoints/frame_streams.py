# SPDX-License-Identifier: Apache-2.0
"""Frames between the chunks of a streamed answer, in the form that clients read.

A frame is a chunk whose delta is empty, so that a client which knows nothing of frames
sees nothing new: `type` is "diffusion_frame", as in Unsloth's servers, and `dlm` says
what changed (docs/watching.md). All other chunks are the ones that vLLM makes.

Nothing waits for a client that reads slowly: it is shown what changed since its last
frame, in one. A frame is held back while tokens of steps before it are not sent yet.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_dlm.entrypoints.frames import CanvasFrame, Watch

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.tokenizers import TokenizerLike

    from vllm_dlm.config.options import Frames

MASK_TEXT = "\N{MEDIUM SHADE}"
"""Stands for a mask in a frame's text."""


class StreamWatcher:
    """Watches the requests of one streamed answer."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        """Set when a frame has come."""
        self.with_text = False
        self._watches: list[Watch] = []
        self._samples = 1
        """Samples of a prompt."""
        self._delivered: dict[int, int] = {}
        """Choice -> its tokens that vLLM has been handed to write."""

    def watches(self, params: SamplingParams, frames: Frames) -> Watch | None:
        """Watch a request, if it is a streamed one with frames."""
        from vllm.sampling_params import RequestOutputKind

        if frames == "off" or params.output_kind != RequestOutputKind.DELTA:
            return None
        self.with_text, self._samples = frames == "text", params.n
        made = Watch(len(self._watches), lambda watch, sample: self.news.set())
        self._watches.append(made)
        return made

    def __bool__(self) -> bool:
        """Whether there is anything to watch."""
        return bool(self._watches)

    def choice_of(self, prompt: int, sample: int) -> int:
        """Number of a choice in the answer."""
        return prompt * self._samples + sample

    def count(self, result: RequestOutput | tuple[int, RequestOutput]) -> None:
        """Count the tokens of a result that vLLM is about to write."""
        prompt, output = result if isinstance(result, tuple) else (0, result)
        for one in output.outputs:
            choice = self.choice_of(prompt, one.index)
            self._delivered[choice] = self.delivered(choice) + len(one.token_ids)

    def delivered(self, choice: int) -> int:
        """Tokens of a choice that vLLM has been handed."""
        return self._delivered.get(choice, 0)

    def written(self) -> dict[int, int]:
        """What is delivered by now, by choice."""
        return dict(self._delivered)

    def take(self, limit: Mapping[int, int]) -> Iterator[tuple[int, CanvasFrame]]:
        """The frames that can be shown, each with its choice.

        Args:
            limit: choice -> its tokens that have been written.
        """
        self.news.clear()
        for watch in self._watches:
            for sample, canvas in sorted(watch.canvases.items()):
                choice, behind = self.choice_of(watch.prompt, sample), canvas.behind
                if behind is not None and behind <= limit.get(choice, 0):
                    frame = watch.show(sample)
                    assert frame is not None
                    yield choice, frame


async def interleaved(
    chunks: AsyncGenerator[str, None], watcher: StreamWatcher, form: FrameForm
) -> AsyncGenerator[str, None]:
    """The chunks of an answer, and frames between them."""
    written: dict[int, int] = {}
    step: asyncio.Task[str] | None = None
    try:
        while True:
            if step is None:
                step = asyncio.create_task(_next(chunks))
            is_there = step.done()
            if is_there and isinstance(step.exception(), StopAsyncIteration):
                return
            # While vLLM waits for a result, all that it was handed is written.
            limit = written if is_there else watcher.written()
            for choice, frame in watcher.take(limit):
                yield form.chunk(choice, frame)
            if is_there:
                text, step = step.result(), None
                written = watcher.written()
                yield text
                continue
            news = asyncio.create_task(watcher.news.wait())
            try:
                await asyncio.wait({step, news}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
    finally:
        if step is not None and not step.done():
            step.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await step
        await chunks.aclose()


async def _next(chunks: AsyncIterator[str]) -> str:
    return await anext(chunks)


class FrameForm:
    """How one answer's frames are written.

    Args:
        answer: fields that all chunks of the answer have: id, object, created, model.
        choice: fields of a choice that says nothing: its delta, or its text.
        tokenizer: None where the server has none: then there are ids alone.
        with_text: whether frames show the active block as text.
    """

    def __init__(
        self,
        answer: Mapping[str, Any],
        choice: Mapping[str, Any],
        tokenizer: TokenizerLike | None,
        *,
        with_text: bool,
    ) -> None:
        self._answer = answer
        self._choice = choice
        self._tokenizer = tokenizer
        self._with_text = with_text
        self._texts: dict[int, str] = {}

    def chunk(self, choice: int, frame: CanvasFrame) -> str:
        """An event of the stream."""
        data: dict[str, Any] = {
            **self._answer,
            "choices": [{"index": choice, **self._choice, "finish_reason": None}],
            "type": "diffusion_frame",
            "block": frame.block,
            "step": frame.step,
            "total": frame.total,
        }
        about: dict[str, Any] = {
            "start": frame.start,
            "end": frame.end,
            "final": frame.final,
            "canvas_end": frame.canvas_end,
            "forward": frame.forward,
            "writes": [
                [at, token, self._text(token), confidence, step]
                for at, token, confidence, step in frame.writes
            ],
        }
        if self._with_text:
            data["text"] = self._block_text(frame.tokens)
            about["masked"] = frame.masked
        text = json.dumps(
            {**data, "dlm": about}, ensure_ascii=False, separators=(",", ":")
        )
        return f"data: {text}\n\n"

    def _text(self, token: int | None) -> str | None:
        """One token's text; what is no whole character shows as U+FFFD."""
        if token is None or self._tokenizer is None:
            return None
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def _block_text(self, tokens: list[int | None]) -> str:
        """A block as text, with `MASK_TEXT` for each mask."""
        parts: list[str] = []
        run: list[int] = []
        for token in [*tokens, None]:
            if token is not None:
                run.append(token)
                continue
            if run and self._tokenizer is not None:
                parts.append(self._tokenizer.decode(run, skip_special_tokens=True))
            parts.append(MASK_TEXT)
            run = []
        # The last one stands for the block's end.
        return "".join(parts[:-1])
