# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm eval MODEL`: its arguments, and the run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vllm_dlm.bench.arguments import (
    DTYPES,
    add_engine_options,
    add_outputs,
    add_settings,
    counts,
    text_option,
)
from vllm_dlm.bench.cells import Results, model_name, without_folders
from vllm_dlm.bench.environment import default_threads, record
from vllm_dlm.cli.arguments import count
from vllm_dlm.evaluation.lm_eval_tasks import PREFIX, HarnessTask, harness_tasks
from vllm_dlm.evaluation.parallelbench.text_metrics import (
    DEFAULT,
    METRICS,
    check_text_options,
)
from vllm_dlm.evaluation.sandbox import Sandbox
from vllm_dlm.evaluation.tasks import (
    FAMILIES,
    Task,
    TaskOptions,
    expanded,
    family_of,
    make_tasks,
)

EXAMPLES = """\
examples:
  vllm-dlm eval llada-tiny --tasks tiny --strategies static,threshold,entropy \\
      --tokens-per-step 1,2,4 --limit 200 --json runs/tiny.json
  vllm-dlm eval ./LLaDA-8B-Instruct --chat --tasks gsm8k,mbpp \\
      --data gsm8k=test.jsonl --data mbpp=mbpp.jsonl --allow-code \\
      --strategies static,threshold --caches none,dual --ar ./Llama-3.1-8B-Instruct
  vllm-dlm eval ./LLaDA-8B-Base --tasks lm-eval:arc_challenge,lm-eval:hellaswag

What the tasks ask and what the columns mean: docs/evaluation.md
"""
CODE = ("confined", "unconfined")
RUN_PROGRAMS = ("mbpp", "humaneval")
SAMPLES = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm eval`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="folder, hub id or alias")
    work = parser.add_argument_group("what is asked")
    work.add_argument(
        "--tasks",
        type=_tasks,
        required=True,
        metavar="NAME,...",
        help=f"of {', '.join(FAMILIES)}; one of a family as parallelbench/shuffle; "
        f"{PREFIX}NAME is a task of lm-evaluation-harness (extra `eval`)",
    )
    work.add_argument(
        "--data",
        type=_data,
        action="append",
        default=[],
        metavar="TASK=FILE",
        help="questions of a task, in their published form",
    )
    work.add_argument(
        "--include-path",
        type=Path,
        metavar="FOLDER",
        help="of further tasks for lm-eval, as YAML",
    )
    work.add_argument("--limit", type=count, help="most questions of each task")
    work.add_argument(
        "--shots", type=int, help="solved examples in front of each question"
    )
    work.add_argument(
        "--chat",
        action="store_true",
        help="ask through the model's chat template (default: as plain text)",
    )
    work.add_argument(
        "--max-tokens",
        type=count,
        help="most new tokens of an answer (default: each task's own)",
    )
    work.add_argument(
        "--samples",
        type=count,
        help=f"masks of each text whose log-likelihood is asked (default: {SAMPLES})",
    )
    work.add_argument(
        "--allow-code",
        nargs="?",
        choices=CODE,
        const=CODE[0],
        help="run programs that the model writes (mbpp, humaneval): without a network "
        "and without your files, or, `unconfined`, with limits on time and memory only",
    )
    work.add_argument(
        "--text-metrics",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="what is measured of free text (parallelbench/texts), the accuracy first: "
        f"of {', '.join(METRICS)} (default: {DEFAULT})",
    )
    work.add_argument(
        "--language-tool",
        metavar="URL",
        help="a LanguageTool server to ask for grammar (default: start one, with Java)",
    )
    work.add_argument("--seed", type=int, default=0)

    cells = parser.add_argument_group("the cells: every combination is measured")
    add_settings(cells)
    cells.add_argument(
        "--tokens-per-step",
        type=counts,
        metavar="N,...",
        help="of strategies that follow a schedule, such as static (default: 1)",
    )
    cells.add_argument(
        "--ar",
        metavar="MODEL",
        help="also ask this autoregressive model, on the same vLLM",
    )
    cells.add_argument(
        "--block-length", type=count, help="of every request (default: the model's own)"
    )

    engine = parser.add_argument_group("how the engine runs")
    engine.add_argument(
        "--concurrency",
        type=count,
        default=16,
        help="requests at a time (default: %(default)s)",
    )
    engine.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="(default: %(default)s, the model's own)",
    )
    add_engine_options(
        engine,
        server="max_canvas=2048",
        engine=", also of --ar's: tensor_parallel_size=2",
    )
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Measure all cells, print the table, write the files."""
    from vllm_dlm.bench.report import check_plotting
    from vllm_dlm.evaluation import report
    from vllm_dlm.evaluation.runner import Runner

    if args.plot is not None:
        check_plotting()
    _check(args)
    args.samples = args.samples or SAMPLES
    sandbox = None
    if args.allow_code is not None:
        sandbox = Sandbox(confine=args.allow_code == CODE[0])
        sandbox.check()
    own, others = _apart(args.tasks)
    options = TaskOptions(
        args.limit,
        args.seed,
        args.shots,
        dict(args.data),
        sandbox,
        tuple(args.text_metrics or [DEFAULT]),
        args.language_tool,
    )
    tasks: list[Task | HarnessTask] = [
        *make_tasks(expanded(own), options),
        *harness_tasks(others, args),
    ]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment = record(default_threads()) | {"arguments": _shown(args)}
    results = Results(args.json, resume=args.resume, environment=environment)
    keys = Runner(args, tasks, results).run()
    known = {cell["key"]: cell for cell in results.cells}
    cells = [known[key] for key in keys]
    report.print_table(cells)
    if args.plot is not None:
        report.plot(cells, args.plot)
        print(f"picture: {args.plot}")
    if args.json is not None:
        print(f"{len(results.cells)} cells: {args.json}")
    return 0


def _apart(names: list[str]) -> tuple[list[str], list[str]]:
    """Our tasks, and lm-eval's."""
    others = [name for name in names if name.startswith(PREFIX)]
    return [name for name in names if name not in others], others


def _check(args: argparse.Namespace) -> None:
    """Refuse what nobody would read, or could not work.

    Raises:
        ValueError: it names the option.
    """
    own, others = _apart(args.tasks)
    check_text_options(expanded(own), args.text_metrics, args.language_tool)
    if args.resume and args.json is None:
        raise ValueError("--resume goes on with a file: name it with --json")
    if args.shots is not None and args.shots < 0:
        raise ValueError(f"--shots must be 0 or more, not {args.shots}")
    if args.allow_code is not None and not set(own) & set(RUN_PROGRAMS):
        raise ValueError(
            f"--allow-code is for {' and '.join(RUN_PROGRAMS)}: --tasks names neither"
        )
    for option, value in (
        ("--include-path", args.include_path),
        ("--samples", args.samples),
    ):
        if value is not None and not others:
            raise ValueError(f"{option} is for tasks of lm-eval: {PREFIX}NAME")
    if others and max(args.tokens_per_step or [1]) > 1:
        raise ValueError(
            "--tokens-per-step: requests of lm-eval have answers of different lengths, "
            "and so no schedule of their own; ask its tasks in a run without"
        )


def _shown(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as they go into the JSON file: without folders."""
    shown = {name: value for name, value in vars(args).items() if name != "run"}
    for name in ("model", "ar"):
        if shown[name] is not None:
            shown[name] = model_name(shown[name])
    kept = {name: shown.pop(name) for name in ("model", "ar", "tasks")}
    return without_folders(shown) | kept


def _tasks(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name.startswith(PREFIX):
            continue
        try:
            family_of(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _data(text: str) -> tuple[str, Path]:
    name, path = text_option(text)
    try:
        family_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, Path(path)
