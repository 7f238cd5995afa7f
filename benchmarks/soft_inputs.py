# SPDX-License-Identifier: Apache-2.0
"""Strategies that feed mixtures of tokens, on llada-tiny: accuracy and forwards.

`smooth` and `dmax` beside `threshold`, and each without its mixtures, in an engine with
`--dlm-soft-inputs`. llada-tiny was not trained for either. Prints the tables of
docs/strategies/smooth.md and dmax.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

from benchmarks.engine import start_engine
from benchmarks.tables import measured_by
from vllm_dlm.tasks.evaluation import evaluate_served
from vllm_dlm.tasks.problems import sample_problems

REQUESTS_AT_A_TIME = 32
MAX_TOKENS, BLOCK_LENGTH = 64, 32
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "`threshold` .8": ("threshold", {"threshold": 0.8}),
    "`smooth`": ("smooth", {}),
    "`smooth`, `weight_start` 0, `weight_growth` 0": (
        "smooth",
        {"weight_start": 0.0, "weight_growth": 0.0},
    ),
    "`dmax`": ("dmax", {}),
    "`dmax`, `soft` false": ("dmax", {"soft": False}),
}


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soft_inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=64,
        help="held-out problems of all tasks (default: %(default)s)",
    )
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    problems = sample_problems(args.num_problems, 0, "heldout")
    lines = ["| | right | forwards of all |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        llm = start_engine(
            folder,
            dlm_soft_inputs=True,
            max_num_seqs=REQUESTS_AT_A_TIME,
            enforce_eager=True,
        )
        for label, (strategy, config) in ROWS.items():
            options = {
                "strategy": strategy,
                "strategy_config": config,
                "block_length": BLOCK_LENGTH,
                "cache": "none",
            }
            found = evaluate_served(
                llm, problems, options, max_tokens=MAX_TOKENS, progress=False
            )
            lines.append(f"| {label} | {found.right} | {found.forwards} |")
        llm.llm_engine.engine_core.shutdown()
    print(f"{measured_by('soft_inputs')}, {len(problems)} problems\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
