# SPDX-License-Identifier: Apache-2.0
"""Engines that serve block-causal models, and what their forwards are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from engine.harness import Engine
from reference.checkpoints import write_checkpoint
from reference.network import TinyModel

PAGE = 32
"""Tokens in a KV page of these engines: two blocks."""
BLOCK = 16
"""Block length that is served, unless a test says otherwise."""

_CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SDAR-4B-Chat-b16": ("sdar", {"max_position_embeddings": 8192}),
    "Fast_dLLM_v2_7B": ("fast_dllm_v2", {"bd_size": BLOCK}),
    "Qwen3-0.6B-diffusion-bd3lm-v0.1": ("a2d_qwen3", {}),
    "Nemotron-Labs-Diffusion-3B": ("nemotron", {}),
}
"""Folder -> family and entries of config.json."""


class BlockEngines:
    """Engines of one kind of model, each started once, and its oracle."""

    def __init__(self, engines: Callable[..., Engine], parent: Path, name: str) -> None:
        self._engines = engines
        self.folder = parent / name
        if not self.folder.exists():
            family, changes = _CHECKPOINTS[name]
            write_checkpoint(family, self.folder, seed=2, **changes)
        self.oracle = TinyModel.from_folder(self.folder)

    def __call__(self, **options: Any) -> Engine:
        """The engine with these options; blocks of 16, 250 positions by default.

        250 is inside a block, and inside a page.
        """
        options = {"max_model_len": 250, "dlm": {"block_length": BLOCK}} | options
        return self._engines(model=str(self.folder), **options)


class Part(NamedTuple):
    """One request's rows of a forward."""

    start: int
    end: int
    canvas: int
    """Rows that the scheduler counts as canvas; 0 says that nothing is decided."""


Forward = dict[str, Part]
"""One forward: the requests in it, by id."""


@contextmanager
def recording(engine: Engine) -> Iterator[list[Forward]]:
    """Every forward that the engine schedules."""
    scheduler, forwards = engine.scheduler, []
    schedule = scheduler.schedule

    def note(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        parts = {}
        for request_id, num_rows in output.num_scheduled_tokens.items():
            end = scheduler.requests[request_id].num_computed_tokens
            forward = scheduler.requests[request_id].in_flight[-1]
            canvas = scheduler.requests[request_id].canvas_rows(forward.rows)
            canvas *= forward.branches
            # vLLM adds random characters to a request's id.
            name = request_id.rpartition("-")[0]
            parts[name] = Part(end - num_rows, end, canvas)
        if parts:
            forwards.append(parts)
        return output

    scheduler.schedule = note
    try:
        yield forwards
    finally:
        del scheduler.schedule


def rows_of(forwards: Sequence[Forward], request_id: str) -> list[tuple[int, int]]:
    """First and last + 1 position of each of a request's forwards."""
    return [
        (forward[request_id].start, forward[request_id].end)
        for forward in forwards
        if request_id in forward
    ]


def assert_only_final_pages_are_published(engine: Engine) -> None:
    """No page that a request could be found by holds a position of an open block."""
    (manager,) = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    for request in engine.scheduler.running:
        pages = manager.req_to_blocks[request.request_id]
        published = [page.block_hash is not None for page in pages]
        final = request.block_start // PAGE
        assert not any(published[final:]), (request.request_id, published, final)
