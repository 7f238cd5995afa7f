# SPDX-License-Identifier: Apache-2.0
"""Time the kernels over rows of logits against plain torch.

A kernel and its counterpart run in turns, so that a busy machine slows both; times are
medians (in the JSON minima as well), and the factor is the median over the turns.
Beside them stands a copy of the same logits, the speed of memory. Counterparts:

    token_stats    the plain-torch reference of the same statistics, all of them
    draw           softmax, divided by exponential noise, argmax: as samplers do it,
                   without the seed per row that `draw` has
    top_logprobs   log_softmax in float32, topk, and the count for the rank

With --against FILE, a former `vllm_dlm/kernels/numba_rows.py`, the counterpart is the
same kernel with the loops in that file:

    git show REVISION:vllm_dlm/kernels/numba_rows.py > before.py
    python -m benchmarks.kernels --against before.py
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_dlm.bench import environment
from vllm_dlm.kernels import draw as draw_module
from vllm_dlm.kernels import numba_rows
from vllm_dlm.kernels import token_stats as stats_module
from vllm_dlm.kernels import top_logprobs as logprobs_module
from vllm_dlm.kernels.draw import draw
from vllm_dlm.kernels.token_stats import token_stats, token_stats_reference
from vllm_dlm.kernels.top_logprobs import top_logprobs

TOP = 20
"""Tokens that `top_logprobs` is asked for: the most that vLLM allows by default."""
TURNS = 2
"""Turns before the first that counts: compilation, caches."""

Timed = tuple[Callable[[], object], Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=None,
        metavar="ROWSxVOCABULARY",
        help="(default: 32x32000 512x32000 32x126464, on a GPU 2048x126464 as well)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        default=["float32", "bfloat16"],
        metavar="DTYPE",
        help="float32, bfloat16, float16 (default: float32 bfloat16)",
    )
    parser.add_argument(
        "--kernels",
        nargs="+",
        choices=tuple(KERNELS),
        default=list(KERNELS),
        metavar="NAME",
        help=f"{', '.join(KERNELS)} (default: all)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="torch's name of it (default here: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="on a CPU (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=50,
        help="turns that count (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="a former numba_rows.py to time instead of plain torch, on a CPU",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results there")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    if args.against is not None and args.device != "cpu":
        parser.error("--against is for --device cpu")
    try:
        against = None if args.against is None else _loops(args.against)
    except ValueError as error:
        parser.error(f"--against: {error}")
    shapes = args.shapes or [(32, 32_000), (512, 32_000), (32, 126_464)]
    if args.shapes is None and args.device != "cpu":
        shapes.append((2048, 126_464))
    torch.set_num_threads(args.threads)
    cases = [
        (name, rows, vocab, dtype)
        for rows, vocab in shapes
        for dtype in args.dtypes
        for name in args.kernels
    ]
    results = [
        measure(*case, device=args.device, repeats=args.repeats, against=against)
        for case in tqdm(cases, desc="kernels", unit="case")
    ]
    show(results, "plain torch" if against is None else "before")
    if args.json is not None:
        record = {
            "environment": environment.record(args.threads),
            "device": args.device,
            "repeats": args.repeats,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


def _shape(text: str) -> tuple[int, int]:
    rows, cross, vocab = text.partition("x")
    if not (cross and rows.isdigit() and vocab.isdigit() and int(rows) and int(vocab)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: rows and vocabulary as in 32x32000"
        )
    return int(rows), int(vocab)


def _loops(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("loops_before", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{str(path)!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- what is timed --------------------------------------------------------


def _statistics(logits: torch.Tensor) -> Timed:
    return (
        lambda: token_stats(logits, True, True, ban_id=0),
        lambda: token_stats_reference(logits, True, True, ban_id=0),
    )


def _draws(logits: torch.Tensor) -> Timed:
    num_rows, device = len(logits), logits.device
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
    rows = torch.arange(num_rows, device=device)
    temperature = torch.full((num_rows,), 0.8, device=device)
    argmax = token_stats(logits).argmax

    def ours() -> torch.Tensor:
        return draw(
            logits, argmax, temperature, top_k=zeros, top_p=zeros + 1.0,
            min_p=zeros * 0.0, seed=zeros, position=rows, step=zeros, rows=rows,
            truncated_rows=rows[:0],
        )  # fmt: skip

    def plain() -> torch.Tensor:
        probability = (logits.float() / temperature[:, None]).softmax(dim=1)
        return (probability / torch.empty_like(probability).exponential_()).argmax(1)

    return ours, plain


def _logprobs(logits: torch.Tensor) -> Timed:
    top = min(TOP, logits.shape[1])
    stats = token_stats(logits)
    tokens = stats.argmax

    def plain() -> tuple[torch.Tensor, ...]:
        scores = logits.float().log_softmax(dim=1)
        chosen = scores.gather(1, tokens[:, None])
        return *scores.topk(top, dim=1), (scores >= chosen).sum(dim=1)

    return lambda: top_logprobs(logits, top, stats.logsumexp, tokens), plain


KERNELS: dict[str, Callable[[torch.Tensor], Timed]] = {
    "token_stats": _statistics,
    "draw": _draws,
    "top_logprobs": _logprobs,
}


def with_loops(loops: Any, kernel: Callable[[], object]) -> Callable[[], object]:
    """The kernel with other loops than `numba_rows`."""
    users: tuple[Any, ...] = (stats_module, draw_module, logprobs_module)

    def call() -> object:
        for user in users:
            user.numba_rows = loops
        try:
            return kernel()
        finally:
            for user in users:
                user.numba_rows = numba_rows

    return call


# -- how it is timed ------------------------------------------------------


def measure(
    name: str,
    rows: int,
    vocab: int,
    dtype: str,
    *,
    device: str,
    repeats: int,
    against: Any = None,
) -> dict[str, Any]:
    """Milliseconds of one kernel, its counterpart and a copy of the logits."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab, device=device, generator=generator) * 3
    logits = logits.to(getattr(torch, dtype))
    target = torch.empty_like(logits)
    ours, other = KERNELS[name](logits)
    if against is not None:
        other = with_loops(against, ours)
    timed = [ours, other, lambda: target.copy_(logits)]
    turns = [[seconds(function) for function in timed] for _ in range(TURNS + repeats)]
    kernel, counterpart, copy = zip(*turns[TURNS:], strict=True)
    size = logits.numel() * logits.element_size()
    milliseconds = statistics.median(kernel) * 1e3
    return {
        "kernel": name,
        "rows": rows,
        "vocab": vocab,
        "dtype": dtype,
        "ms": milliseconds,
        "counterpart_ms": statistics.median(counterpart) * 1e3,
        "copy_ms": statistics.median(copy) * 1e3,
        "factor": statistics.median(
            other / ours for ours, other in zip(kernel, counterpart, strict=True)
        ),
        "least_ms": min(kernel) * 1e3,
        "counterpart_least_ms": min(counterpart) * 1e3,
        "read_gb_per_s": size / milliseconds / 1e6,
        # A copy moves each byte twice.
        "of_copy_bandwidth": statistics.median(
            other / ours / 2 for ours, other in zip(kernel, copy, strict=True)
        ),
    }


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, with all that it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def show(results: list[dict[str, Any]], counterpart: str) -> None:
    """Print the table; `counterpart` says what the kernels are compared with."""
    table = Table(title="Kernels over rows of logits")
    for column in ("kernel", "rows x vocabulary", "dtype"):
        table.add_column(column)
    for column in ("ms", f"{counterpart}, ms", "factor", "GB/s", "of copy bandwidth"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row["kernel"],
            f"{row['rows']} x {row['vocab']:,}",
            row["dtype"],
            f"{row['ms']:.3f}",
            f"{row['counterpart_ms']:.3f}",
            f"{row['factor']:.2f}",
            f"{row['read_gb_per_s']:.1f}",
            f"{row['of_copy_bandwidth']:.0%}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
