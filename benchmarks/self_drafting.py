# SPDX-License-Identifier: Apache-2.0
"""Models that draft or skip by themselves: accuracy, forwards, accepted drafts.

The model is llama-tiny, or a folder that `vllm-dlm train lud llama-tiny` or `vllm-dlm
train layer-skip llama-tiny` has written; it answers held-out questions greedily: plain,
by Jacobi blocks, and, if it was trained for that, behind pads of its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.answers import TARGET, built_in
from benchmarks.speculation import Row, add_load, measure, table
from benchmarks.tables import hardware
from benchmarks.ways_to_draft import Setting
from vllm_dlm.config.aliases import resolve
from vllm_dlm.files.model_folders import Config

BLOCKS = (4, 16)
"""Guesses of a Jacobi block."""
THRESHOLDS = (0.0, 0.5, 0.9)


def settings(model: str) -> list[Setting]:
    """Plain decoding, Jacobi blocks, and `lud` for a model that was trained for it."""
    found = [Setting("plain", "", None)]
    for size in BLOCKS:
        config = {"method": "jacobi", "num_speculative_tokens": size}
        found.append(Setting("jacobi", f"block {size}", config))
    trained = Config(Path(resolve(model))).values.get("lud")
    if isinstance(trained, dict):
        for threshold in THRESHOLDS:
            config = {
                "method": "lud",
                "num_speculative_tokens": trained["tokens"] + 1,
                "threshold": threshold,
            }
            found.append(Setting("lud", f"threshold {threshold:g}", config))
    return found


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.self_drafting", description=__doc__
    )
    parser.add_argument(
        "--model", default=TARGET, help="folder or alias (default: %(default)s)"
    )
    add_load(parser)
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["jacobi", "lud"],
        choices=["jacobi", "lud"],
        help="beside plain decoding (default: both)",
    )
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    workload = replace(built_in(args.num_problems, "float32"), model=args.model)
    rows: list[Row] = []
    plain = None
    methods = ("plain", *args.methods)
    chosen = [one for one in settings(args.model) if one.method in methods]
    for setting in tqdm(chosen, unit="setting"):
        row, tokens = measure(setting, workload, plain, args.requests, 0.0)
        plain = tokens if plain is None else plain
        rows.append(row)
    print(
        f"{args.model}, {args.num_problems} questions, {args.requests} at a time, "
        f"float32, greedily; {hardware()}\n"
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
