# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm bench`: its arguments, and the run over all cells."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from vllm_dlm.bench.arguments import (
    DTYPES,
    add_engine_options,
    add_outputs,
    add_settings,
    against,
    counts,
    dtypes,
    text_option,
)
from vllm_dlm.bench.cells import Results, model_name, without_folders
from vllm_dlm.bench.environment import default_threads, record
from vllm_dlm.cli.arguments import count

MODES = ("serve", "offline")
SOFTMAX = ("float64", "float32")

EXAMPLES = """\
examples:
  vllm-dlm bench --model llada-tiny --strategies static,threshold,learn2pd
  vllm-dlm bench --model random-60m --caches dual --strategies static --steps 64 \\
      --concurrency 1,16 --against plain,ar --json runs/60m.json --plot runs/60m.png
  vllm-dlm bench --model ./my-model --prompts questions.jsonl
  vllm-dlm bench --model random:family=diffusion_gemma --strategies renoise \\
      --against native --step-costs
  vllm-dlm bench --against adapter:benchmarks/openai_endpoint.py:OpenAIEndpoint \\
      --adapter-option url=http://localhost:8000/v1

On one core: OMP_NUM_THREADS=1 taskset -c 0 vllm-dlm bench --mode offline ...
What the columns mean: docs/benchmarking.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    work = parser.add_argument_group("what is asked")
    work.add_argument(
        "--model",
        default="llada-tiny",
        help="llada-tiny (with problems whose answers are checked), random-60m, "
        "random:d=64,layers=2,heads=2,mlp=128,vocab=256,family=sdar (what is not named "
        "is as in random-60m; families llada, sdar and diffusion_gemma), or a folder, "
        "hub id or alias "
        "(default: %(default)s)",
    )
    work.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="for a model of yours: JSON lines with a `prompt` and, for an accuracy "
        "(exact match), an `answer`; without it, random token ids",
    )
    work.add_argument(
        "--requests",
        type=count,
        help="requests in a cell (default: twice the concurrency, 4 at least)",
    )
    work.add_argument(
        "--prompt-len",
        type=count,
        default=128,
        help="tokens of a random prompt (default: %(default)s)",
    )
    work.add_argument(
        "--max-tokens",
        type=count,
        default=256,
        help="most new tokens of a request; all of them where prompts are random "
        "(default: %(default)s)",
    )
    work.add_argument("--seed", type=int, default=0)

    cells = parser.add_argument_group("the cells: every combination is measured")
    add_settings(cells)
    cells.add_argument(
        "--concurrency",
        type=counts,
        default="1,4,16",
        metavar="N,...",
        help="requests in flight (default: %(default)s)",
    )
    cells.add_argument(
        "--dtype",
        type=dtypes,
        default="bfloat16",
        metavar="NAME,...",
        help=f"of {', '.join(DTYPES)} (default: %(default)s)",
    )
    cells.add_argument(
        "--block-length",
        type=count,
        help="(default: the model's own; 32 for random weights)",
    )
    cells.add_argument(
        "--steps",
        type=count,
        help="denoise steps over a request's canvas, for strategies with a schedule "
        "(default: one token per step)",
    )
    cells.add_argument(
        "--against",
        type=against,
        default="",
        metavar="NAME,...",
        help="also measure: plain (a PyTorch loop, one request at a time: static and "
        "threshold), ar (an autoregressive model of this size on the same vLLM), "
        "native (DiffusionGemma by vLLM's own code), "
        "adapter:FILE.py:Class (any other engine)",
    )
    cells.add_argument(
        "--skip-ours", action="store_true", help="measure only what --against names"
    )

    engines = parser.add_argument_group("how the engines run")
    engines.add_argument(
        "--mode",
        choices=MODES,
        default="serve",
        help="serve: vLLM in processes of its own, as a server has it; offline: in "
        "this process, as vllm.LLM has it (default: %(default)s)",
    )
    engines.add_argument(
        "--threads",
        type=count,
        help="threads of the model, for every engine (default: OMP_NUM_THREADS, or the "
        "cores that this process may use)",
    )
    add_engine_options(
        engines,
        server="commit=separate, eotp=block",
        engine=", ours and ar alike: enforce_eager=true",
    )
    engines.add_argument(
        "--adapter-option",
        type=text_option,
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="handed to adapters: url=http://localhost:8000/v1",
    )
    engines.add_argument(
        "--plain-batch",
        type=count,
        default=1,
        help="requests that the plain loop decodes as one batch (default: %(default)s)",
    )
    engines.add_argument(
        "--plain-softmax",
        choices=SOFTMAX,
        default="float64",
        help="the public loops have %(default)s, which is the default",
    )
    engines.add_argument(
        "--step-times",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="count rows, time forwards and steps in vLLM's worker (default: on a CPU; "
        "on an accelerator it waits for the device at each reading)",
    )
    engines.add_argument(
        "--step-costs",
        action="store_true",
        help="after each cell of vLLM's, run requests once more and count what "
        "steps launch and allocate, and what the engine holds for its requests",
    )

    add_outputs(parser)


# -- the run --------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Measure all cells, print the table, write the files."""
    from vllm_dlm.bench import report
    from vllm_dlm.bench.runner import Runner

    if args.skip_ours and not args.against:
        raise ValueError("--skip-ours leaves nothing: name engines with --against")
    if args.requests is not None and args.requests < max(args.concurrency):
        raise ValueError(
            f"--requests {args.requests} cannot keep --concurrency "
            f"{max(args.concurrency)} requests in flight: ask for as many at least"
        )
    if args.plot is not None:
        report.check_plotting()
    args.threads = args.threads or default_threads()
    _set_threads(args.threads)
    environment = record(args.threads) | {"arguments": _shown(args)}
    results = Results(args.json, resume=args.resume, environment=environment)
    with tempfile.TemporaryDirectory(prefix="vllm-dlm-bench-") as folder:
        keys = Runner(args, Path(folder), results).run()
    cells = [cell for cell in results.cells if cell["key"] in keys]
    report.print_table(cells)
    if args.plot is not None:
        report.plot(cells, args.plot)
        print(f"picture: {args.plot}")
    if args.json is not None:
        print(f"{len(results.cells)} cells: {args.json}")
    return 0


def _set_threads(threads: int) -> None:
    """Let vLLM's processes have as many threads as the plain loop has here."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["NUMBA_NUM_THREADS"] = str(threads)
    # Otherwise vLLM binds one thread to each core that it finds, but for one.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # What counts memory says when it begins and ends, otherwise (`step_costs.py`).
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def _shown(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as they go into the JSON file."""
    shown = {name: value for name, value in vars(args).items() if name != "run"}
    # An address or a key is nobody's business.
    shown["adapter_option"] = [name for name, _ in args.adapter_option]
    return without_folders(shown) | {"model": model_name(args.model)}
