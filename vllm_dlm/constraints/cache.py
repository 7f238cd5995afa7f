# SPDX-License-Identifier: Apache-2.0
"""Constraints that have been compiled, and are kept for requests to come.

What a client asks for is a `Source`; its pattern and automaton depend on the tokenizer
and on which tokens end a text or are barred as well.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock

from vllm_dlm.constraints.automaton import Automaton
from vllm_dlm.constraints.grammar import grammar_node
from vllm_dlm.constraints.json_text import Layout
from vllm_dlm.constraints.limits import DEFAULT, ConstraintError, Limits
from vllm_dlm.constraints.schema import schema_pattern
from vllm_dlm.constraints.structural import structural_pattern
from vllm_dlm.constraints.syntax import choice, literal, write
from vllm_dlm.constraints.thoughts import ThoughtEnd, compile_answer
from vllm_dlm.constraints.vocabulary import Vocabulary


@dataclass(frozen=True)
class Source:
    """What a text must match, in the client's words."""

    kind: str
    """`regex`, `choice`, `json`, `grammar` or `structural_tag`."""
    text: str
    """The regular expression, or the grammar; else JSON: a list of texts, a schema, a
    tag."""
    whitespace: str | None = None
    """With `json`: a regular expression for blanks; None for the usual."""
    closed: bool = False
    """With `json`: objects have no other properties than those that are named."""

    def pattern(self) -> str:
        """The regular expression.

        Raises:
            ConstraintError: there is none, or none that is supported.
        """
        if self.kind == "regex":
            return self.text
        if self.kind == "grammar":
            return write(grammar_node(self.text))
        value = json.loads(self.text)
        if self.kind == "choice":
            return write(choice(map(literal, value)))
        if self.kind == "structural_tag":
            return structural_pattern(value, Layout())
        return schema_pattern(value, self.whitespace, closed=self.closed)


@dataclass(frozen=True)
class Compiled:
    """A constraint that can be used."""

    pattern: str
    automaton: Automaton


@dataclass(frozen=True)
class Job:
    """All that a constraint is compiled from."""

    source: Source
    vocabulary: Callable[[], Vocabulary]
    """Makes the vocabulary, or has it."""
    tokenizer: Hashable
    """Which vocabulary that is."""
    end_ids: tuple[int, ...]
    barred: tuple[int, ...] = ()
    thought: ThoughtEnd | None = None
    """What ends a thought in front of the text."""

    @property
    def key(self) -> Hashable:
        return self.source, self.tokenizer, self.end_ids, self.barred, self.thought

    def run(self, limits: Limits = DEFAULT) -> Compiled | ConstraintError:
        """Compile; what is wrong is returned, as it is kept like a result."""
        try:
            pattern = self.source.pattern()
            automaton = compile_answer(
                *(pattern, self.thought, self.vocabulary()),
                *(self.end_ids, self.barred, limits),
            )
        except ConstraintError as error:
            return ConstraintError(str(error))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            # Of a value that is no structural tag, or too deep for Python.
            return ConstraintError(
                f"{self.source.kind}: malformed or nested too deeply ({error!r:.100})"
            )
        return Compiled(pattern, automaton)


class Cache:
    """What was compiled last, bounded in number and in bytes; for many threads.

    Args:
        most: results that are kept.
        most_bytes: memory of their automata and texts.
    """

    def __init__(self, most: int = 64, most_bytes: int = 256 << 20) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[Hashable, tuple[Compiled | ConstraintError, int]]
        self._kept = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return self._bytes

    def get(self, job: Job) -> Compiled | ConstraintError | None:
        """What a job has given, if that is still known."""
        with self._lock:
            found = self._kept.get(job.key)
            if found is None:
                return None
            self._kept.move_to_end(job.key)
            return found[0]

    def put(self, job: Job, result: Compiled | ConstraintError) -> None:
        """Keep what a job has given, and forget what was not asked for longest."""
        size = len(job.source.text) + 8 * len(job.barred)
        if isinstance(result, Compiled):
            size += result.automaton.num_bytes + len(result.pattern)
        with self._lock:
            _, before = self._kept.pop(job.key, (None, 0))
            self._kept[job.key] = result, size
            self._bytes += size - before
            while len(self._kept) > 1 and (
                len(self._kept) > self._most or self._bytes > self._most_bytes
            ):
                _, (_, gone) = self._kept.popitem(last=False)
                self._bytes -= gone
