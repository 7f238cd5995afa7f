# SPDX-License-Identifier: Apache-2.0
"""Serve llada-tiny with a folder of Learn2PD filters: accuracy, forwards, rows."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine import RowCounter
from vllm_dlm.tasks.evaluation import evaluate_served
from vllm_dlm.tasks.problems import sample_problems

MODEL = "llada-tiny"
REQUESTS_AT_A_TIME = 32


def main() -> int:
    """Measure, and print the lines of a table."""
    args = _arguments()
    # The scheduler must be here, to be asked for its rows.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    problems = sample_problems(args.num_problems, 0, "heldout")
    with tempfile.TemporaryDirectory() as folder:
        llm = _start(Path(folder) / MODEL, args.filters)
        counter = RowCounter(llm)
        print("| strategy | canvas | cache | accuracy | forwards | rows |")
        print("|---|--:|---|--:|--:|--:|")
        for canvas in args.canvas:
            for strategy in args.strategies:
                for cache in args.caches:
                    before = counter.rows
                    served = evaluate_served(
                        llm,
                        problems,
                        {"strategy": strategy, "cache": cache},
                        max_tokens=canvas,
                        progress=False,
                    )
                    rows = (counter.rows - before) / served.problems
                    print(
                        f"| {strategy} | {canvas} | {cache} | {served.accuracy:.1%} | "
                        f"{served.forwards_per_request:.2f} | {rows:,.0f} |",
                        flush=True,
                    )
        llm.llm_engine.engine_core.shutdown()
    return 0


def _start(model: Path, filters: Path | None) -> Any:
    """An engine of a copy of llada-tiny, with these filters in place of its own."""
    from vllm_dlm import LLM
    from vllm_dlm.config.aliases import resolve

    shutil.copytree(resolve(MODEL), model)
    if filters is not None:
        shutil.rmtree(model / "learn2pd")
        shutil.copytree(filters, model / "learn2pd")
    return LLM(str(model), dlm_online_learning=False, max_num_seqs=REQUESTS_AT_A_TIME)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.filters", description=__doc__
    )
    parser.add_argument(
        "--filters",
        type=Path,
        metavar="FOLDER",
        help="holds files such as b32-none.safetensors (default: llada-tiny's own)",
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=495,
        help="held-out problems per line (default: %(default)s)",
    )
    parser.add_argument(
        "--canvas",
        type=int,
        nargs="+",
        default=[256],
        help="widths of the canvas (default: 256)",
    )
    parser.add_argument(
        "--caches",
        nargs="+",
        default=["none", "prefix", "dual"],
        help="cache policies (default: none prefix dual)",
    )
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["learn2pd"],
        help="strategies (default: learn2pd)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
