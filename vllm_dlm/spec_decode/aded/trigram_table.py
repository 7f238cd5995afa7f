# SPDX-License-Identifier: Apache-2.0
"""Tri-grams of a corpus: how often token c follows tokens a, b.

`TrigramCounts` counts token sequences, `TrigramTable` keeps the most frequent
successors of each pair as weights p(c | a, b), and a safetensors file holds the table
with the vocabulary that it is about. `vllm-dlm count-trigrams` writes such files, ADED
(`drafting.py`, arXiv 2407.12021) drafts from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_dlm.files.tensor_files import (
    Rule,
    check_tensors,
    read_safetensors,
    write_safetensors,
)
from vllm_dlm.files.whole_files import MIB, BadFile

KEPT_SUCCESSORS = 12
"""Successors that a table keeps of each pair (the paper's code)."""

_BITS = 21
"""Bits of a token id: three ids fit into an int64."""
_CHUNK = 1 << 22
"""Tri-grams sorted at a time, 32 MiB."""
_FORMAT = "tri-grams 1"
_WHAT = "tri-grams"
_MOST_BYTES = 16_384 * MIB
_RULES = {
    "firsts": Rule("F", (torch.int64,), least=0),
    "seconds": Rule("P", (torch.int32,), least=0, may_be_empty=True),
    "starts": Rule("S", (torch.int64,), least=0),
    "tokens": Rule("N", (torch.int32,), least=0, may_be_empty=True),
    "weights": Rule("N", (torch.float32,), least=0, most=1, may_be_empty=True),
}


class TrigramTable(NamedTuple):
    """Weights of the P pairs' N successors, as compressed rows.

    The second tokens seen behind token a are `seconds[firsts[a]:firsts[a + 1]]`; pair
    number p, an index into `seconds`, has `tokens[starts[p]:starts[p + 1]]` behind it.
    """

    firsts: np.ndarray
    """[V + 1] int64."""
    seconds: np.ndarray
    """[P] int32, ascending within a row."""
    starts: np.ndarray
    """[P + 1] int64."""
    tokens: np.ndarray
    """[N] int32, heaviest first within a pair, lower ids first among equals."""
    weights: np.ndarray
    """[N] float32 in (0, 1]: the share of the pair's occurrences."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.firsts) - 1


def empty_table(vocab_size: int) -> TrigramTable:
    """A table without tri-grams."""
    return _table(
        np.empty(0, np.int64),
        np.empty(0, np.int32),
        np.empty(0, np.float32),
        vocab_size,
    )


class TrigramCounts:
    """Counts of the tri-grams of token sequences; memory grows with distinct ones."""

    def __init__(self, vocab_size: int) -> None:
        """Start at zero.

        Args:
            vocab_size: V; ids are below it.

        Raises:
            ValueError: V is not from 1 to 2**21.
        """
        if not 1 <= vocab_size <= 1 << _BITS:
            raise ValueError(
                f"vocab_size: expected 1 to {1 << _BITS}, got {vocab_size}"
            )
        self.vocab_size = vocab_size
        self.num_trigrams = 0
        self._keys = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Count the tri-grams of one sequence.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        ids = np.asarray(tokens, np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"token ids from {ids.min()} to {ids.max()} do not fit the vocabulary "
                f"of {self.vocab_size}"
            )
        if len(ids) < 3:
            return
        self.num_trigrams += len(ids) - 2
        self._waiting.append((ids[:-2] << 2 * _BITS) | (ids[1:-1] << _BITS) | ids[2:])
        self._num_waiting += len(ids) - 2
        if self._num_waiting >= _CHUNK:
            self._merge()

    def table(self, keep: int = KEPT_SUCCESSORS, min_count: int = 1) -> TrigramTable:
        """The table of what was counted so far.

        Args:
            keep: most successors of a pair, the most frequent.
            min_count: tri-grams seen less often are left out.
        """
        self._merge()
        pairs, tokens = self._keys >> _BITS, self._keys & ((1 << _BITS) - 1)
        _, begins, sizes = np.unique(pairs, return_index=True, return_counts=True)
        totals = np.add.reduceat(self._counts, begins) if len(begins) else begins
        shares = self._counts / np.repeat(totals, sizes)
        # Stable, and the keys are sorted: lower ids come first among equals.
        order = np.lexsort((-self._counts, pairs))
        ranks = np.arange(len(order)) - np.repeat(begins, sizes)
        kept = order[(ranks < keep) & (self._counts[order] >= min_count)]
        return _table(
            pairs[kept],
            tokens[kept].astype(np.int32),
            shares[kept].astype(np.float32),
            self.vocab_size,
        )

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting, self._num_waiting = [], 0
        both = np.concatenate([self._keys, keys])
        order = np.argsort(both, kind="stable")
        both = both[order]
        begins = np.flatnonzero(np.diff(both, prepend=-1))
        merged = np.concatenate([self._counts, counts])[order]
        self._keys, self._counts = both[begins], np.add.reduceat(merged, begins)


def _table(
    pairs: np.ndarray, tokens: np.ndarray, weights: np.ndarray, vocab_size: int
) -> TrigramTable:
    """Build a table from the pair of each successor, [N] int64, ascending."""
    distinct, begins = np.unique(pairs, return_index=True)
    return TrigramTable(
        firsts=np.searchsorted(distinct >> _BITS, np.arange(vocab_size + 1)),
        seconds=(distinct & ((1 << _BITS) - 1)).astype(np.int32),
        starts=np.append(begins, len(pairs)),
        tokens=tokens,
        weights=weights,
    )


def fingerprint(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary: which token has which id."""
    items = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:32]


def save_table(
    path: str | Path, table: TrigramTable, facts: Mapping[str, str] | None = None
) -> None:
    """Write a table.

    Args:
        path: a file, safetensors; its folder is made.
        facts: what is known of it, as metadata. "fingerprint" is the tokenizer's, for
            `load_table` to compare.
    """
    metadata = {**(facts or {}), "format": _FORMAT, "vocab_size": str(table.vocab_size)}
    write_safetensors(path, table._asdict(), metadata)


def load_table(
    path: str | Path, vocab_size: int, tokenizer: str | None = None
) -> TrigramTable:
    """Read a table for a model.

    Args:
        vocab_size: of the model; the tokenizer's may be smaller.
        tokenizer: `fingerprint` of the model's tokenizer; None if it has none.

    Raises:
        ValueError: there is no such table, or it is about another vocabulary.
    """
    hint = "`vllm-dlm count-trigrams --tokenizer MODEL` writes such a file"
    try:
        table, facts = _read(path)
    except ValueError as error:
        raise ValueError(f"{error}; {hint}") from None
    made_of = facts.get("fingerprint")
    if table.vocab_size > vocab_size or (
        tokenizer is not None and made_of is not None and tokenizer != made_of
    ):
        source = facts.get("tokenizer", "another model")
        raise ValueError(
            f"the tri-grams {path} were counted with another vocabulary, that of "
            f"{source} ({table.vocab_size} tokens; this model has {vocab_size}); {hint}"
        )
    return table


def _read(path: str | Path) -> tuple[TrigramTable, dict[str, str]]:
    """A table of which no look-up can read outside the arrays, and its facts."""
    tensors, facts = read_safetensors(path, _WHAT, _MOST_BYTES)
    if facts.get("format") != _FORMAT:
        found = facts.get("format", "none")[:80]
        raise ValueError(
            f"{path} holds no tri-grams: its format is {found!r}, expected {_FORMAT!r}"
        )
    try:
        check_tensors(tensors, _RULES, path, _WHAT)
        table = TrigramTable(*(tensors[name].numpy() for name in TrigramTable._fields))
        if problem := _problem_of(table):
            raise BadFile(_WHAT, path, problem)
    except BadFile as error:
        raise ValueError(f"the tri-grams {path} are damaged: {error.reason}") from None
    return table, facts


def _problem_of(table: TrigramTable) -> str:
    """What would have a look-up read outside the arrays, or return no weight."""
    size = table.vocab_size
    if not 1 <= size <= 1 << _BITS:
        return f"firsts: a vocabulary of {size}; expected 1 to {1 << _BITS}"
    if not _are_bounds(table.firsts, len(table.seconds)):
        return "firsts: expected ascending bounds of the rows of seconds"
    within = np.ones(len(table.seconds), bool)
    within[table.firsts[:-1][table.firsts[:-1] < len(within)]] = False
    if (np.diff(table.seconds, prepend=-1) <= 0)[within].any():
        return "seconds: expected ascending ids in each row"
    if len(table.starts) != len(table.seconds) + 1 or not _are_bounds(
        table.starts, len(table.tokens)
    ):
        return "starts: expected ascending bounds of each pair's tokens"
    for name, ids in (("seconds", table.seconds), ("tokens", table.tokens)):
        if len(ids) and ids.max() >= size:
            return f"{name}: {ids.max()} is outside the vocabulary of {size} tokens"
    if not (table.weights > 0).all():
        return "weights: it holds 0; expected shares over 0"
    return ""


def _are_bounds(bounds: np.ndarray, last: int) -> bool:
    return (
        len(bounds) > 0
        and bounds[0] == 0
        and bounds[-1] == last
        and bool((np.diff(bounds) >= 0).all())
    )
