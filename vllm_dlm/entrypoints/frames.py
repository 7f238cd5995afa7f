# SPDX-License-Identifier: Apache-2.0
"""Who watches canvases, and what they are shown: the front end's side of frames.

The engine sends a `Frame` of a watched request after each of its steps
(`model_executor/frames.py`). Here each sample's canvas is kept, so that whoever is slow
to look misses no change: what is shown next is all that changed since. A request is
watched if whoever admits it stands in `watching` meanwhile: the HTTP server for streams
(`patches/replies.py` writes them), `LLM.generate` for a callback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakValueDictionary

from vllm_dlm.config.frames import MASK, NOT_READ, Frame, take_frame
from vllm_dlm.config.request_options import read_request
from vllm_dlm.messages import OptionError

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.output_processor import RequestState

    from vllm_dlm.config.options import Frames
    from vllm_dlm.config.request import RequestConfig


class Write(NamedTuple):
    """A position that changed."""

    position: int
    """In output tokens."""
    token: int | None
    """None: it is a mask again, or is cut off."""
    confidence: float | None
    """Probability of the token in the step that wrote it; None where the step has not
    read the position's logits."""
    step: int
    """That step, from 0 over the whole request, as in a step map."""


@dataclass(frozen=True)
class CanvasFrame:
    """What changed on one sample's canvas since the frame before, and what is open."""

    prompt: int
    """Which prompt of the request, from 0."""
    sample: int
    """Which of its `n` samples, from 0."""
    block: int
    """The active block, from 0."""
    step: int
    """The step in that block, from 0."""
    total: int
    """Most steps that the block is planned to take."""
    forward: int
    """The step in the request, from 0."""
    start: int
    """The block's first position; all positions count output tokens."""
    end: int
    """One past the block's last position, as far as the canvas goes."""
    final: int
    """Tokens that were final, and handed out, before the step."""
    canvas_end: int
    """Where the canvas ends: what lay behind it is gone."""
    writes: list[Write]
    tokens: list[int | None]
    """Of the block; None for a mask."""

    @property
    def masked(self) -> list[int]:
        """Positions of the block that are masked."""
        pairs = enumerate(self.tokens, start=self.start)
        return [position for position, token in pairs if token is None]


class Canvas:
    """One sample's canvas, and what of it has changed since it was last shown."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._changes: dict[int, Write] = {}
        self._last: Frame | None = None
        """The newest frame, while it is not shown."""
        self._behind = 0

    @property
    def behind(self) -> int | None:
        """Tokens that vLLM was handed before what is to be shown; None: nothing is."""
        return None if self._last is None else self._behind

    def take(self, frame: Frame, handed: int) -> None:
        """Take over what a step has left.

        Args:
            handed: tokens of the sample that vLLM was handed before.
        """
        tokens, known = self._tokens, len(self._tokens)
        for position in range(max(frame.end, 0), known):
            self._note(position, MASK, NOT_READ, frame)
        del tokens[max(frame.end, 0) :]
        pairs = zip(frame.tokens, frame.confidence, strict=True)
        for position, (token, confidence) in enumerate(pairs, start=frame.start):
            # What was handed out stays, while a replay decides it again.
            if position >= frame.final or token != MASK:
                self._note(position, token, confidence, frame)
        for position, token in enumerate(frame.emitted, start=frame.final):
            self._note(position, token, NOT_READ, frame)
        self._last, self._behind = frame, handed

    def _note(self, position: int, token: int, confidence: float, frame: Frame) -> None:
        self._tokens += [MASK] * (position + 1 - len(self._tokens))
        if self._tokens[position] == token:
            return
        self._tokens[position] = token
        is_mask = token == MASK
        self._changes[position] = Write(
            position,
            None if is_mask else token,
            None if is_mask or confidence == NOT_READ else confidence,
            frame.forward,
        )

    def show(self, prompt: int, sample: int) -> CanvasFrame | None:
        """All that changed since the last time; None where no step came since."""
        frame, self._last = self._last, None
        if frame is None:
            return None
        changes, self._changes = self._changes, {}
        start, end = frame.start, frame.start + len(frame.tokens)
        return CanvasFrame(
            prompt=prompt,
            sample=sample,
            block=frame.block,
            step=frame.step,
            total=frame.total,
            forward=frame.forward,
            start=start,
            end=end,
            final=frame.final,
            canvas_end=frame.end,
            writes=[changes[position] for position in sorted(changes)],
            tokens=[
                None if token == MASK else token for token in self._tokens[start:end]
            ],
        )


@dataclass(eq=False)
class Watch:
    """One request to the engine, of one prompt, that somebody watches."""

    prompt: int
    """Which prompt of the watcher's it is, from 0."""
    tell: Callable[[Watch, int], object]
    """Called with this and a sample's number when a step of it has come."""
    canvases: dict[int, Canvas] = field(default_factory=dict)
    """By sample."""

    def take(self, sample: int, frame: Frame, handed: int) -> None:
        """Take over a step of a sample; see `Canvas.take`."""
        self.canvases.setdefault(sample, Canvas()).take(frame, handed)
        self.tell(self, sample)

    def show(self, sample: int) -> CanvasFrame | None:
        """What changed on a sample's canvas since the last time."""
        return self.canvases[sample].show(self.prompt, sample)


_numbers = itertools.count(1)
_watches: WeakValueDictionary[int, Watch] = WeakValueDictionary()
"""By number, which no client learns, as long as somebody watches."""


class Watcher(Protocol):
    """Who watches the requests that are admitted meanwhile."""

    def watches(self, params: SamplingParams, frames: Frames) -> Watch | None:
        """Who is told of a request's frames; None for nobody.

        Args:
            frames: what the request's options say.
        """


_watcher: ContextVar[Watcher | None] = ContextVar("vllm_dlm_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have all requests watched that are admitted meanwhile."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def watcher() -> Watcher | None:
    """Who watches the requests that are admitted now."""
    return _watcher.get()


def watch(config: RequestConfig, params: SamplingParams) -> int | None:
    """Have a request watched, if its options or its watcher ask for it.

    Returns:
        The number by which its frames come back; None where nobody watches.

    Raises:
        OptionError: the request itself asks for frames, and nobody can be shown any;
            or it combines them with `tccf`.
    """
    watcher = _watcher.get()
    made = None if watcher is None else watcher.watches(params, config.frames)
    if made is None and config.frames == "off":
        return None
    if made is not None and config.tccf is None:
        number = next(_numbers)
        _watches[number] = made
        return number
    asked = read_request(params.extra_args)
    name = asked.names["frames"]
    is_meant = asked.has("frames") and config.frames != "off"
    if made is not None and (is_meant or config.frames == "off"):
        raise OptionError(
            f"{name}: frames cannot be combined with tccf: the check text is written "
            "by no step; leave one of them out",
            name,
        )
    if made is None and is_meant:
        raise OptionError(
            f"{name}: frames come with streams of /v1/completions and "
            "/v1/chat/completions alone; set `stream` there, or leave them out. "
            "dlm_step_map gives a whole answer's steps; offline, "
            "LLM.generate(..., on_frame=...) has frames.",
            name,
        )
    return None


def deliver(
    outputs: list[EngineCoreOutput], states: Mapping[str, RequestState]
) -> list[EngineCoreOutput]:
    """Hand the frames that came with an engine's outputs to whoever watches.

    Args:
        outputs: frames are taken off them.
        states: vLLM's, by request, of those that go on.

    Returns:
        The outputs without those that were there for their frame alone.
    """
    if all(output.kv_transfer_params is None for output in outputs):
        return outputs
    left = []
    for output in outputs:
        frame = take_frame(output)
        if frame is None:
            left.append(output)
            continue
        if output.new_token_ids or output.finished:
            left.append(output)
        one = _watches.get(frame.watched)
        state = states.get(output.request_id)
        if one is not None and state is not None and state.detokenizer is not None:
            handed = state.detokenizer.num_output_tokens()
            one.take(state.request_index, frame, handed)
    return left


class FrameCalls:
    """Watches the requests of an offline call, and calls a function with each frame.

    Args:
        on_frame: called on the engine's own thread: the next step waits for it.
    """

    def __init__(self, on_frame: Callable[[CanvasFrame], object]) -> None:
        self._on_frame = on_frame
        self._watches: list[Watch] = []

    def watches(self, params: SamplingParams, frames: Frames) -> Watch:
        """Watch every request, whatever its options say."""
        made = Watch(len(self._watches), self._tell)
        self._watches.append(made)
        return made

    def _tell(self, watch: Watch, sample: int) -> None:
        frame = watch.show(sample)
        assert frame is not None
        self._on_frame(frame)
