# SPDX-License-Identifier: Apache-2.0
"""The `vllm-dlm` command; each subcommand imports what it needs when it is chosen."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vllm_dlm.cli.arguments import count
from vllm_dlm.cli.subcommands import TOOLS, TRAINABLE

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from rich.table import Table

    from vllm_dlm.strategies import Strategy
    from vllm_dlm.strategies.presets import Preset

DESCRIPTION = """\
Serve diffusion language models on stock vLLM. Serving itself is vLLM's own command:

  vllm serve llada-tiny --dlm-strategy learn2pd    a server (llada-tiny is built in)
  vllm serve --help=DlmConfig                      all flags for diffusion models

The commands below show what there is, check the installation, and train.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `vllm-dlm`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = make_parser(argv).parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"vllm-dlm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vllm-dlm: interrupted", file=sys.stderr)
        return 130


def make_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of `vllm-dlm`.

    Args:
        argv: the command line; only modules of the subcommand named in it are
            imported for their arguments.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-dlm",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    strategies = commands.add_parser(
        "strategies",
        help="list the decoding strategies, or one's parameters",
        description="List the decoding strategies. With NAME: its parameters, which go "
        "into --dlm-strategy-config or a request's `strategy_config`.",
    )
    strategies.add_argument("name", nargs="?", metavar="NAME", help="a strategy")
    strategies.set_defaults(run=lambda args: _show_strategies(args.name))

    speculation = commands.add_parser(
        "speculation",
        help="list the speculative methods, or one's options",
        description="List the methods that draft for autoregressive models. With "
        "METHOD: its options, which go into vLLM's --speculative-config.",
    )
    speculation.add_argument(
        "method", nargs="?", metavar="METHOD", help="a method of the list"
    )
    speculation.set_defaults(run=lambda args: _show_speculation(args.method))

    models = commands.add_parser(
        "models",
        help="list the models with a short name, or how one is decoded",
        description="List the models with a short name. Any other checkpoint of "
        "these families is served by its folder or hub id. With MODEL: how that one is "
        "decoded where neither server nor request says. Nothing is downloaded.",
    )
    models.add_argument(
        "model", nargs="?", metavar="MODEL", help="a folder, or a model of the list"
    )
    models.add_argument(
        "--memory",
        action="store_true",
        help="show what MODEL's weights and keys take, and how many requests fit on "
        "a GPU; by its config alone",
    )
    models.add_argument(
        "--length",
        type=count,
        metavar="TOKENS",
        help="of a request, prompt and answer, for --memory (default: 4096)",
    )
    models.set_defaults(run=_show_models)

    doctor = commands.add_parser(
        "doctor",
        help="check that vLLM loads this package, and show what it changes",
        description="Check that vLLM loads this package: versions, plugins, platform, "
        "patched symbols, models, strategies. Exit status 1 if something is wrong.",
    )
    doctor.set_defaults(run=lambda args: _run_doctor())

    train = commands.add_parser(
        "train",
        help="train a model of your own by a recipe, a drafter, or a built-in model",
        description="Train a built-in model from scratch, what drafts for an "
        "autoregressive model, or a diffusion model of your own by a recipe; an "
        "interrupted run resumes. docs/training.md has the recipes.",
    )
    trainable = train.add_subparsers(metavar="WHAT", required=True)
    for name, (module, summary) in TRAINABLE.items():
        is_chosen = argv[:2] == ["train", name]
        _add_tool(trainable, name, module, f"train {summary}", is_chosen)
    for name, (module, summary) in TOOLS.items():
        if find_spec(module) is not None:
            _add_tool(commands, name, module, summary, argv[:1] == [name])
    return parser


def _add_tool(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    module: str,
    summary: str,
    is_chosen: bool,
) -> None:
    tool = commands.add_parser(name, help=summary, description=f"{summary}.")
    if is_chosen:
        imported = import_module(module)
        imported.add_arguments(tool)
        run: Callable[[argparse.Namespace], int | None] = imported.run
        tool.set_defaults(run=run)


def _show_strategies(name: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from vllm_dlm.strategies import STRATEGIES

    console = Console()
    if name is not None:
        _show_strategy(name, STRATEGIES[name])
        return
    table = Table("strategy", "summary", "source", box=None, pad_edge=False)
    for known in STRATEGIES:
        strategy = STRATEGIES[known]
        table.add_row(known, strategy.summary, strategy.paper)
    console.print(table)
    console.print("\nParameters of one: vllm-dlm strategies NAME", highlight=False)


def _show_strategy(name: str, strategy: type[Strategy]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(
        Text(
            f"{name}: {strategy.summary}\nSource: {strategy.paper}\n"
            f"Options steps, steps_per_block: {_use_of_steps(strategy)}\n"
        )
    )
    fields = strategy.Params.model_fields
    if not fields:
        console.print("It has no parameters.")
        return
    console.print(_table_of(fields, "parameter"))
    if strategy.Params.presets:
        console.print("")
        console.print(_table_of_presets(strategy.Params.presets))
    console.print(
        Text(
            f"\nvllm serve MODEL --dlm-strategy {name} "
            f"--dlm-strategy-config.{next(iter(fields))} VALUE"
        )
    )


def _use_of_steps(strategy: type[Strategy]) -> str:
    """Whether a strategy follows the step schedule."""
    from vllm_dlm.messages import with_parameters

    if isinstance(strategy.schedule, bool):
        return "followed" if strategy.schedule else "not for it, and refused"
    return f"followed with {with_parameters(strategy.schedule)}, else refused"


def _show_speculation(method: str | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vllm_dlm.messages import unknown
    from vllm_dlm.registry import load

    methods = load("vllm_dlm.spec_decode.options:METHODS")
    console = Console(highlight=False)
    if method is None:
        table = Table("method", "summary", "source", box=None, pad_edge=False)
        for name, kind in methods.items():
            table.add_row(name, kind.summary, kind.paper)
        console.print(table)
        console.print("\nOptions of one: vllm-dlm speculation METHOD")
        return
    if method not in methods:
        raise ValueError(unknown(method, methods))
    kind = methods[method]
    fields = kind.model_fields
    console.print(Text(f"{method}: {kind.summary}\nSource: {kind.paper}\n"))
    console.print(_table_of(fields, "option"))
    example = {"method": method}
    if "model" in fields:
        example["model"] = "DRAFTER"
    length = fields["num_speculative_tokens"].default
    if length is not None:
        example["num_speculative_tokens"] = length
    console.print(
        Text(f"\nvllm serve TARGET --speculative-config '{json.dumps(example)}'")
    )


def _table_of(fields: Mapping[str, FieldInfo], what: str) -> Table:
    """A row for each field of a pydantic model."""
    from rich.table import Table
    from rich.text import Text

    from vllm_dlm.messages import values_of

    table = Table(what, "values", "default", "meaning", box=None, pad_edge=False)
    for name, field in fields.items():
        default = "required" if field.is_required() else str(field.default)
        cells = (name, values_of(field), default, field.description or "")
        table.add_row(*map(Text, cells))
    return table


def _table_of_presets(presets: Mapping[str, Preset]) -> Table:
    """A row for each preset of a strategy."""
    from rich.table import Table
    from rich.text import Text

    table = Table("preset", "parameters", "source", box=None, pad_edge=False)
    table.add_row("default", "the defaults", "the table above")
    for name, preset in presets.items():
        values = ", ".join(f"{key} {value}" for key, value in preset.values.items())
        beside = f"; published with {preset.beside}" if preset.beside else ""
        table.add_row(*map(Text, (name, values, preset.source + beside)))
    return table


def _show_models(args: argparse.Namespace) -> None:
    from vllm_dlm.cli import models

    models.show(args.model, memory=args.memory, length=args.length)


def _run_doctor() -> int:
    from vllm_dlm.cli.doctor import run

    return run()
