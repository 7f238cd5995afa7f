# SPDX-License-Identifier: Apache-2.0
"""What every row of every KV page was computed with, and whether others may find it.

The ledger watches the network's own inputs: token ids, positions, and the attention
metadata that say where keys and values go and which are seen. It asks the scheduler
for nothing but the pages that can be found, and what text they are found by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from engine.harness import Engine
from vllm.forward_context import get_forward_context
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_block_hash


class Row(NamedTuple):
    """Key and value of one position, by what they were computed from."""

    position: int
    seen: tuple[int, ...]
    """The tokens of all positions that it saw, from 0 on."""
    is_clean: bool
    """Each key that it saw was itself computed from a beginning of `seen`."""


class Text(NamedTuple):
    """What a hash stands for."""

    tokens: tuple[int, ...]
    block_length: int


UNKNOWN = -1
"""Token of a position whose key nobody has written."""


class PageLedger:
    """Of one engine, from `watching` on; pages of earlier requests are forgotten."""

    def __init__(self, engine: Engine) -> None:
        self._scheduler = engine.scheduler
        manager = self._scheduler.kv_cache_manager
        (group,) = manager.kv_cache_config.kv_cache_groups
        self._page_size = group.kv_cache_spec.block_size
        self._pool = manager.block_pool
        self._is_causal = self._scheduler.dlm_defaults.attention == "causal"
        self._rows: dict[int, Row] = {}
        self._requests: dict[str, Any] = {}
        self._texts: dict[Any, Text] = {}
        self.found: set[Any] = set()
        """Hashes of all pages that could ever be found."""

    # -- what the network computes ------------------------------------------------

    def copy_pages(self, copies: Any) -> None:
        """Pages are copied before the forward that follows."""
        size = self._page_size
        for copy in copies or ():
            source, target = copy.src_block_id * size, copy.dst_block_id * size
            for place in range(size):
                self._rows.pop(target + place, None)
                if source + place in self._rows:
                    self._rows[target + place] = self._rows[source + place]

    def note_forward(self, input_ids: Any, positions: Any) -> None:
        """A forward that begins now."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return  # vLLM's own dummy batch
        layer = next(iter(metadata.values()))
        count = layer.num_actual_tokens
        slots = layer.slot_mapping[:count].tolist()
        places, tokens = positions[:count].tolist(), input_ids[:count].tolist()
        assert len(set(slots)) == count, "two rows of a forward in one place"
        fresh = dict(zip(slots, zip(places, tokens, strict=True), strict=True))
        bounds = layer.query_start_loc.tolist()
        lengths = layer.seq_lens.tolist()
        causal = [bool(layer.causal)] * len(lengths)
        if layer.dynamic_causal is not None:
            causal = [bool(flag) for flag in layer.dynamic_causal.tolist()]

        written: dict[int, Row] = {}
        views = []
        for number, length in enumerate(lengths):
            own = slots[bounds[number] : bounds[number + 1]]
            if not own:
                continue
            seen_slots = self._slots(layer.block_table[number].tolist(), length)
            seen = tuple(
                self._token(place, slot, fresh) for place, slot in enumerate(seen_slots)
            )
            for slot in own:
                position = fresh[slot][0]
                view = seen[: position + 1] if causal[number] else seen
                written[slot] = Row(position, view, UNKNOWN not in view)
            views.append((own, seen_slots, seen))
        # What a row saw is right only if what was seen is: until nothing changes.
        changed = True
        while changed:
            changed = False
            for own, seen_slots, seen in views:
                rows = [written.get(s) or self._rows.get(s) for s in seen_slots]
                wrong = [
                    place
                    for place, row in enumerate(rows)
                    if row is None
                    or not row.is_clean
                    or row.seen != seen[: len(row.seen)]
                ]
                first_wrong = wrong[0] if wrong else len(seen)
                for slot in own:
                    row = written[slot]
                    if row.is_clean and len(row.seen) > first_wrong:
                        written[slot] = row._replace(is_clean=False)
                        changed = True
        self._rows |= written

    def _slots(self, pages: list[int], length: int) -> list[int]:
        size = self._page_size
        return [pages[p // size] * size + p % size for p in range(length)]

    def _token(self, place: int, slot: int, fresh: dict[int, tuple[int, int]]) -> int:
        """The token that a position's key is of, if it is that position's at all."""
        if slot in fresh:
            position, token = fresh[slot]
            return token if position == place else UNKNOWN
        row = self._rows.get(slot)
        return row.seen[place] if row and row.position == place else UNKNOWN

    # -- what can be found ----------------------------------------------------------

    def note_requests(self) -> None:
        """Remember what texts there are, those of finished requests included."""
        self._requests |= self._scheduler.requests
        for request in self._requests.values():
            tokens = tuple(request.all_token_ids)
            for number, block_hash in enumerate(request.block_hashes, start=1):
                if block_hash not in self._texts:
                    self._texts[block_hash] = Text(
                        tokens[: number * self._page_size], request.dlm.block_length
                    )

    def check(self) -> None:
        """Each page that can be found is what a forward of its text would compute.

        Raises:
            AssertionError: a page can be found whose KV was computed with a mask, or
                with a token that changed later, where its text has another.
        """
        self.note_requests()
        table = self._pool.cached_block_hash_to_block
        for key, pages in table._cache.items():
            blocks = [pages] if isinstance(pages, KVCacheBlock) else pages.values()
            text = self._texts[get_block_hash(key)]
            self.found.add(key)
            for block in blocks:
                self._check_page(block.block_id, text)

    def _check_page(self, page: int, text: Text) -> None:
        end = len(text.tokens)
        for place in range(self._page_size):
            position = end - self._page_size + place
            row = self._rows.get(page * self._page_size + place)
            assert row is not None, f"page {page}: {position} was never computed"
            block = 1 if self._is_causal else text.block_length
            sees = (position // block + 1) * block
            assert row.position == position, (
                f"page {page}: {row.position} where {position} should be"
            )
            assert row.seen == text.tokens[:sees], (
                f"page {page}, position {position}: computed with "
                f"{row.seen[-block:]}, found by {text.tokens[sees - block : sees]}"
            )
            assert row.is_clean, f"page {page}, position {position}: saw stale keys"


@contextmanager
def watching(engine: Engine) -> Iterator[PageLedger]:
    """A ledger that is checked before and after every step of the engine."""
    if engine.busy:
        raise ValueError("the engine has requests whose pages were not watched")
    assert engine.llm.reset_prefix_cache()
    ledger = PageLedger(engine)
    scheduler = engine.scheduler
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        ledger.check()
        output = schedule(*args, **kwargs)
        ledger.note_requests()
        ledger.copy_pages(output.kv_cache_block_copies)
        return output

    def updated(*args: Any, **kwargs: Any) -> Any:
        # The forward that was scheduled has run by now.
        ledger.check()
        outputs = update(*args, **kwargs)
        ledger.check()
        return outputs

    def forward(module: Any, args: Any, kwargs: Any) -> None:
        ledger.note_forward(kwargs["input_ids"], kwargs["positions"])

    hook = engine.runner.model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        with (
            patch.object(scheduler, "schedule", scheduled),
            patch.object(scheduler, "update_from_output", updated),
        ):
            yield ledger
            ledger.check()
    finally:
        hook.remove()
