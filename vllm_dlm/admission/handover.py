# SPDX-License-Identifier: Apache-2.0
"""A request's options are read once, in the process that admits the request.

Several checks in that process need what the options say, and so do the scheduler and
the worker, in processes of their own. The first check notes it in a private copy of the
request's parameters, for a user may use an object for many requests and engines. When
vLLM has made the engine's request, the note takes the options' place as plain data
(`config/carried.py`).
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from vllm_dlm.config.carried import AUTOMATA, PATTERN, THOUGHT, WATCHED, carry

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.config.request import RequestConfig
    from vllm_dlm.constraints.thoughts import ThoughtEnd


class NotedOptions(dict[str, Any]):
    """`extra_args` as they were sent, with a note of what they say.

    No client can send one: the note is an attribute, and a body holds dicts.
    """

    config: RequestConfig | None = None
    """How the request will be decoded; None before its options are read."""
    pattern: str | None = None
    """What its text must match; None for any text."""
    thought: ThoughtEnd | None = None
    """What ends a thought in front of that; None where no thought is told apart."""
    automata: str | None = None
    """Where the pattern's automaton may lie."""
    watched: int | None = None
    """Who watches its canvas (`config/carried.py`, `WATCHED`); None for nobody."""


def take_notes(params: SamplingParams) -> None:
    """Let what is read of a request's options be noted in its parameters.

    Args:
        params: of one request to one engine, nobody else's.
    """
    if not isinstance(params.extra_args, NotedOptions):
        params.extra_args = NotedOptions(params.extra_args or {})


def private_copy(params: SamplingParams) -> SamplingParams:
    """Parameters that can take notes: a copy, or these if they can already."""
    if not isinstance(params.extra_args, NotedOptions):
        params = copy(params)
        take_notes(params)
    return params


def noted(params: SamplingParams) -> RequestConfig | None:
    """What was noted of a request's options, if anything was."""
    asked = params.extra_args
    return asked.config if isinstance(asked, NotedOptions) else None


def note(params: SamplingParams, config: RequestConfig) -> None:
    """Note what a request's options say, if its parameters can take notes."""
    if isinstance(params.extra_args, NotedOptions):
        params.extra_args.config = config
        if config.canvas is not None:
            # The copy is this request's alone: its lengths are its canvas's.
            params.max_tokens = config.canvas.max_tokens
            if config.canvas.handed is None:
                # No stop string, nor what else waits for this, cuts it before.
                least = max(params.min_tokens, config.canvas.pins_end)
                params.min_tokens = least


def note_pattern(params: SamplingParams, pattern: str, automata: str | None) -> bool:
    """Note what a request's text must match; returns whether its parameters can.

    Args:
        automata: folder in which the pattern's automaton may lie.
    """
    if not isinstance(params.extra_args, NotedOptions):
        return False
    params.extra_args.pattern = pattern
    params.extra_args.automata = automata
    return True


def send_off(params: SamplingParams) -> None:
    """Give an engine's request what was noted, as plain data in place of its options.

    Args:
        params: of the engine's request; `extra_args` are replaced, not changed.
    """
    asked = params.extra_args
    if isinstance(asked, NotedOptions):
        sent = asked if asked.config is None else carry(asked, asked.config)
        if asked.pattern is not None:
            sent = {**sent, PATTERN: asked.pattern, AUTOMATA: asked.automata}
            if asked.thought is not None:
                sent[THOUGHT] = tuple(asked.thought)
        if asked.watched is not None:
            sent = {**sent, WATCHED: asked.watched}
        params.extra_args = dict(sent) or None
