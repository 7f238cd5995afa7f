# SPDX-License-Identifier: Apache-2.0
"""The run over all cells: which there are, and each engine started once for its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from vllm_dlm.bench.cells import Cell, Results, digest
from vllm_dlm.bench.checkpoints import write_autoregressive
from vllm_dlm.bench.engine import Costing, Engine, Unsupported, Work, load_adapter
from vllm_dlm.bench.environment import peak_gflops
from vllm_dlm.bench.measure import Limit, measure, measure_costs
from vllm_dlm.bench.workloads import make_workload

OURS, PLAIN, AUTOREGRESSIVE, NATIVE = "vllm-dlm", "plain", "ar", "native"
FEWEST_REQUESTS = 4


class Runner:
    """A run of the benchmark.

    Args:
        args: of the command line, checked.
        folder: for random weights.
        results: where cells are kept.
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, results: Results
    ) -> None:
        self.args = args
        self.folder = folder
        self.results = results
        self.cells = list(_all_cells(args))
        self.workload = make_workload(
            args.model,
            folder,
            num_prompts=max(map(self._num_requests, self.cells)),
            prompt_length=args.prompt_len,
            block_length=args.block_length,
            seed=args.seed,
            prompts_file=args.prompts,
        )
        if NATIVE in args.against and self.workload.gemma is None:
            raise ValueError(
                "--against native is DiffusionGemma by vLLM's own code, and "
                f"{args.model} is another model: leave native out"
            )

    def run(self) -> set[str]:
        """Measure what is not measured yet; the keys of all cells of this run."""
        from tqdm import tqdm

        keys = {cell.key(self._facts(cell)): cell for cell in self.cells}
        todo = {key: cell for key, cell in keys.items() if not self.results.has(key)}
        total = sum(map(self._num_requests, todo.values()))
        with tqdm(total=total, unit="request", smoothing=0) as bar:
            for (name, dtype), group in groupby(
                todo.items(), lambda item: (item[1].engine, item[1].dtype)
            ):
                bar.set_description(f"{name} {dtype}: starting")
                threads = self.args.threads
                limit = Limit(
                    peak_gflops(dtype, threads), threads, not torch.cuda.is_available()
                )
                with self._started(name, dtype) as engine:
                    for key, cell in group:
                        where = f"{cell.setting}, {cell.concurrency} at once"
                        bar.set_description(f"{name} {dtype}: {where}")
                        numbers = self._measured(engine, cell, limit, bar.update)
                        self.results.add(cell.described() | {"key": key} | numbers)
        return set(keys)

    def _measured(
        self, engine: Engine, cell: Cell, limit: Limit, on_answer: Callable[[], Any]
    ) -> dict[str, Any]:
        args = self.args
        workload = self.workload.first(self._num_requests(cell))
        if is_other := cell.engine == AUTOREGRESSIVE:
            workload = replace(workload, check=None)
        work = Work(
            max_tokens=args.max_tokens,
            concurrency=cell.concurrency,
            # An autoregressive model of random weights would end anywhere.
            ignore_eos=workload.ignore_eos or is_other,
            temperature=workload.temperature,
            strategy=cell.strategy,
            strategy_config=cell.strategy_config,
            cache=cell.cache,
            cache_config=cell.cache_config,
            block_length=workload.block_length,
            steps=args.steps,
        )
        try:
            numbers = measure(engine, workload, work, limit=limit, on_answer=on_answer)
        except Unsupported as error:
            return {"error": str(error)}
        if args.step_costs and isinstance(engine, Costing):
            numbers |= measure_costs(engine, workload, work)
        return numbers

    @contextmanager
    def _started(self, name: str, dtype: str) -> Iterator[Engine]:
        """An engine with its model loaded; it is stopped in the end."""
        args, workload = self.args, self.workload
        block = workload.block_length or 64
        if workload.gemma is not None:
            block = workload.gemma.canvas_length
        options: dict[str, Any] = {
            "dtype": dtype,
            "threads": args.threads,
            "seed": args.seed,
            "ends_texts": not workload.ignore_eos and name != AUTOREGRESSIVE,
            "max_concurrency": max(cell.concurrency for cell in self.cells),
            # A canvas is whole blocks.
            "max_length": workload.longest_prompt
            + -(-args.max_tokens // block) * block,
        }
        model = workload.model
        engine: Engine
        if name == PLAIN:
            from vllm_dlm.bench.plain import PlainEngine

            engine = PlainEngine(args.plain_batch, args.plain_softmax)
        elif name in (OURS, AUTOREGRESSIVE, NATIVE):
            from vllm_dlm.bench.served import (
                AutoregressiveEngine,
                NativeEngine,
                VllmEngine,
            )

            wanted = dict(args.engine_option)
            kind = VllmEngine
            size = getattr(torch, dtype).itemsize
            if name == NATIVE:
                kind = NativeEngine
                assert workload.gemma is not None
                options["token_bytes"] = size * workload.gemma.numbers_per_token
            if name == OURS:
                # As a server of each strategy would run: the warm-up compiles.
                eager = wanted.get("enforce_eager", False)
                server = {"compile": "none" if eager else "all"}
                if workload.gemma is not None:
                    server["diffusion_gemma"] = "engine"
                wanted["additional_config"] = {"dlm": server | dict(args.server_option)}
            if name == AUTOREGRESSIVE:
                kind = AutoregressiveEngine
                shape = workload.dense_shape
                folder = self.folder / "autoregressive"
                model = str(write_autoregressive(folder, shape, seed=args.seed))
                options["token_bytes"] = size * shape.numbers_per_token
            engine = kind(wanted, args.mode, self._times_steps(), args.step_costs)
        else:
            engine = load_adapter(name.partition(":")[2])()
            options |= dict(args.adapter_option)
        engine.start(model, options)
        try:
            yield engine
        finally:
            engine.stop()

    def _times_steps(self) -> bool:
        asked: bool | None = self.args.step_times
        return not torch.cuda.is_available() if asked is None else asked

    def _num_requests(self, cell: Cell) -> int:
        asked: int | None = self.args.requests
        return asked or max(2 * cell.concurrency, FEWEST_REQUESTS)

    def _facts(self, cell: Cell) -> dict[str, Any]:
        """What of the arguments a cell's result depends on."""
        args = self.args
        facts = {
            "model": self.workload.name,
            "prompts": args.prompts and args.prompts.name,
            "requests": self._num_requests(cell),
            "prompt_len": args.prompt_len,
            "max_tokens": args.max_tokens,
            "block_length": args.block_length,
            "steps": args.steps,
            "seed": args.seed,
            "threads": args.threads,
            # What names and folders do not tell apart.
            "inputs": digest([args.model, args.prompts, cell.engine]),
        }
        if args.step_costs:
            facts["step_costs"] = True
        if cell.engine == PLAIN:
            return facts | {"softmax": args.plain_softmax}
        # Of options the file has no folder, address or key: their digest.
        if cell.engine in (OURS, AUTOREGRESSIVE, NATIVE):
            facts |= {"mode": args.mode, "engine_options": digest(args.engine_option)}
            server = args.server_option if cell.engine == OURS else []
            return facts | {"server_options": digest(server)}
        return facts | {"adapter_options": digest(args.adapter_option)}


def _all_cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Every combination, those of one engine and dtype in a row."""
    engines = [*([] if args.skip_ours else [OURS]), *args.against]
    settings = [
        (*strategy, *cache) for strategy in args.strategies for cache in args.caches
    ]
    for dtype in args.dtype:
        for engine in engines:
            if engine in (AUTOREGRESSIVE, NATIVE):
                for concurrency in args.concurrency:
                    yield Cell(engine, dtype, concurrency)
                continue
            # The plain loop has no more at once than its batch.
            at_once = [args.plain_batch] if engine == PLAIN else args.concurrency
            for setting in settings:
                for concurrency in at_once:
                    yield Cell(engine, dtype, concurrency, *setting)
