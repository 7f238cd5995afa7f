# SPDX-License-Identifier: Apache-2.0
"""Patterns that texts must match, compiled for a model's tokens and kept.

Admission has compiled a pattern before its request comes here. Worker and scheduler
read its automaton from a file (`constraints/shelf.py`); where there is none they
compile it when they first need it, and a step waits. What cannot be compiled does not
come here; if it does all the same, nothing matches it, and its requests end with an
error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from vllm.logger import init_logger

from vllm_dlm.admission.structured import barred_ids, vocabulary_of
from vllm_dlm.config.carried import AUTOMATA, THOUGHT
from vllm_dlm.constraints import shelf
from vllm_dlm.constraints.automaton import Automaton, ConstraintError
from vllm_dlm.constraints.paths import Graph, walk
from vllm_dlm.constraints.thoughts import ThoughtEnd, compile_answer
from vllm_dlm.kernels.class_stats import TokenClasses
from vllm_dlm.model_executor.sampling.restrictions import known_ids

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

    from vllm_dlm.kernels.shards import VocabShard

logger = init_logger(__name__)

MOST_KEPT = 64
"""Patterns that are kept for requests to come."""

_kept: OrderedDict[tuple[object, ...], Pattern] = OrderedDict()


class Pattern:
    """An automaton, and what is made of it once."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self.graph = Graph.of(automaton)
        self._classes: dict[object, TokenClasses] = {}

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.automaton.transitions.shape[1])

    def classes(
        self, device: torch.device, shard: VocabShard | None = None
    ) -> TokenClasses:
        """The tokens of each class, or those of a rank's part of the vocabulary."""
        part = None if shard is None else (shard.first, shard.size)
        key = device, part
        if key not in self._classes:
            self._classes[key] = TokenClasses.of(
                self.automaton.class_of, self.num_classes, device, shard
            )
        return self._classes[key]

    def matches(self, tokens: Sequence[int]) -> bool:
        """Whether an output is a text that matches, and nothing but end tokens."""
        state = walk(self.automaton, self.automaton.start, np.asarray(tokens))
        return state >= 0 and bool(self.automaton.accepting[state])


def pattern_of(
    model_config: ModelConfig,
    text: str,
    params: SamplingParams,
    stop_ids: Sequence[int],
    no_text: Iterable[int],
) -> Pattern:
    """A request's pattern.

    Args:
        text: the regular expression.
        params: of the request: tokens that it rules out are ruled out.
        stop_ids: tokens that end the request.
        no_text: tokens of the model that are never written (`ModelDefaults.no_text`).
    """
    size = model_config.get_vocab_size()
    name = model_config.tokenizer, model_config.tokenizer_revision, size
    ends = tuple(sorted(known_ids(stop_ids, size)))
    barred = barred_ids(params, size, no_text)
    beside = params.extra_args or {}
    thought = ThoughtEnd(*beside[THOUGHT]) if THOUGHT in beside else None
    key = name, text, thought, ends, barred
    if key not in _kept:
        automaton = None
        folder = beside.get(AUTOMATA)
        if folder is not None:
            file = shelf.file_name(text, thought, name, ends, barred)
            automaton = shelf.read(folder, file)
        try:
            if automaton is None:
                vocabulary = vocabulary_of(model_config)
                automaton = compile_answer(text, thought, vocabulary, ends, barred)
        except ConstraintError as error:
            logger.error("A pattern that was admitted cannot be compiled: %s", error)
            automaton = nothing(size)
        _kept[key] = Pattern(automaton)
        while len(_kept) > MOST_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return _kept[key]


def nothing(vocab_size: int) -> Automaton:
    """An automaton that takes no text."""
    return Automaton(
        class_of=np.full(vocab_size, -1, dtype=np.int32),
        transitions=np.full((1, 1), -1, dtype=np.int32),
        accepting=np.zeros(1, dtype=np.bool_),
        min_length=np.full(1, 1 << 30, dtype=np.int32),
        max_length=np.zeros(1, dtype=np.int32),
        end_state=0,
        end_class=0,
    )
