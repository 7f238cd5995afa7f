# SPDX-License-Identifier: Apache-2.0
"""Show how DEL's choice of exit and draft length follows the text (arXiv 2504.05598).

One engine answers questions of one task after the other, one at a time, and each
round's choice is written down. A table says what the rounds of each task did; --plot
draws all rounds: each exit's acceptance, the chosen exit, the chosen length. With
several rules after --stop, each answers the same questions, and a table compares them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tqdm import tqdm

from benchmarks.answers import TARGET, engine
from benchmarks.speculation import counting
from benchmarks.tables import hardware
from vllm_dlm.bench.report import check_plotting
from vllm_dlm.config.aliases import resolve
from vllm_dlm.spec_decode.options import Del
from vllm_dlm.tasks.problems import TASKS, sample_problems

if TYPE_CHECKING:
    from vllm_dlm.spec_decode.del_exit.proposer import Round

MAX_TOKENS = 64


@dataclass(frozen=True)
class Phase:
    """The rounds of one task's questions, and what they cost."""

    task: str
    rounds: list[tuple[Round, int]]
    """Each with the number of its drafted tokens that were accepted."""
    tokens: int
    target_forwards: int
    draft_layers: int
    """Layers times tokens that were run through them, for the drafts."""

    def layers_per_token(self, num_layers: int) -> float:
        """Layers computed per token; `num_layers` without speculation."""
        computed = num_layers * self.target_forwards + self.draft_layers
        return computed / self.tokens


def measure(llm: Any, tasks: Sequence[str], num_problems: int) -> list[Phase]:
    """Answer `num_problems` questions of each task, and again where a task recurs."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    drafter = _drafter(llm)
    phases = []
    with tqdm(total=len(tasks) * num_problems, unit="question") as progress:
        for number, task in enumerate(tasks):
            rounds, tokens = [], 0
            drafter.counts.clear()
            with counting(llm) as counts:
                for problem in sample_problems(
                    num_problems, number, "heldout", tasks=[task]
                ):
                    drafter.rounds = []
                    [result] = llm.generate(
                        [problem.question], sampling, use_tqdm=False
                    )
                    written = list(result.outputs[0].token_ids)
                    tokens += len(written)
                    rounds += accepted(
                        drafter.rounds, result.prompt_token_ids + written
                    )
                    progress.update()
            phases.append(
                Phase(
                    task,
                    rounds,
                    tokens,
                    counts["target_forwards"],
                    drafter.counts["layer_rows"],
                )
            )
    if drafter.failed:
        raise SystemExit("drafting failed, as logged above")
    return phases


def accepted(rounds: Sequence[Round], text: Sequence[int]) -> list[tuple[Round, int]]:
    """The rounds of one request, each with how many of its drafted tokens it got.

    Args:
        rounds: of a greedy request: what is accepted is what the text goes on with.
        text: tokens of the prompt and the whole answer.
    """
    found = []
    for entry in rounds:
        pairs = zip(entry.tokens, text[entry.num_tokens :], strict=False)
        same = takewhile(lambda pair: pair[0] == pair[1], pairs)
        found.append((entry, sum(1 for _ in same)))
    return found


def table(phases: Sequence[Phase], num_layers: int) -> str:
    """Markdown: a row per phase."""
    heads = [
        "task",
        "rounds",
        "without a draft",
        "exits (share of drafts)",
        "drafted",
        "accepted",
        "tokens per forward",
        "layers per token",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|---|--:|--:|--:|--:|"]
    for phase in phases:
        drafts = [entry for entry, _ in phase.rounds if entry.tokens]
        cells = [
            phase.task,
            str(len(phase.rounds)),
            f"{1 - len(drafts) / len(phase.rounds):.0%}",
            _shares(entry.choice.exit for entry in drafts),
            f"{sum(len(entry.tokens) for entry in drafts) / len(phase.rounds):.2f}",
            f"{sum(count for _, count in phase.rounds) / len(phase.rounds):.2f}",
            f"{phase.tokens / phase.target_forwards:.2f}",
            f"{phase.layers_per_token(num_layers):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(phases: Mapping[str, Sequence[Phase]], num_layers: int) -> str:
    """Markdown: a row per rule that stopped drafts, over all of its phases."""
    heads = [
        "`stop`",
        "tokens per forward",
        "drafted per forward",
        "drafts accepted",
        f"tokens per {num_layers} layers",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|--:|--:|--:|"]
    for stop, own in phases.items():
        rounds = [entry for phase in own for entry in phase.rounds]
        drafted = sum(len(entry.tokens) for entry, _ in rounds)
        tokens = sum(phase.tokens for phase in own)
        forwards = sum(phase.target_forwards for phase in own)
        layers = num_layers * forwards + sum(phase.draft_layers for phase in own)
        cells = [
            f"`{stop}`",
            f"{tokens / forwards:.2f}",
            f"{drafted / forwards:.2f}",
            f"{sum(count for _, count in rounds) / drafted:.0%}" if drafted else "",
            f"{tokens / layers * num_layers:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _shares(exits: Iterable[int]) -> str:
    counts = {exit: len(list(same)) for exit, same in groupby(sorted(exits))}
    total = sum(counts.values())
    return ", ".join(f"{exit}: {n / total:.0%}" for exit, n in counts.items())


def plot(
    phases: Sequence[Phase], exits: Sequence[int], num_layers: int, path: Path
) -> None:
    """Draw all rounds from left to right, a shade per phase."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    rates, chosen, lengths = figure.subplots(3, 1, sharex=True)
    rounds = [entry for phase in phases for entry in phase.rounds]
    at = range(len(rounds))
    for index, exit in enumerate(exits):
        rates.plot(
            at,
            [entry.acceptance[index] for entry, _ in rounds],
            color=colormaps["viridis"](index / max(1, len(exits) - 1)),
            label=f"{exit}",
        )
    rates.legend(
        title="exit", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    rates.set(ylabel="acceptance rate", ylim=(0, 1.02))
    # No exit where no draft pays.
    kept = [entry.choice.exit if entry.choice.length else None for entry, _ in rounds]
    chosen.plot(at, kept, ".", markersize=3)
    chosen.set(ylabel=f"chosen exit, of {num_layers} layers", ylim=(0, num_layers))
    lengths.plot(at, [entry.choice.length for entry, _ in rounds], ".", markersize=3)
    lengths.plot(at, _smooth([count for _, count in rounds]), color="C1")
    lengths.set(ylabel="tokens per draft", xlabel="round")
    lengths.legend(
        ["chosen length", "accepted, mean of 25"],
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    for axes in (chosen, lengths):
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    begin = 0
    for number, phase in enumerate(phases):
        end = begin + len(phase.rounds)
        for axes in (rates, chosen, lengths):
            axes.axvspan(begin, end, color=f"C{number % 2}", alpha=0.07, linewidth=0)
        rates.text((begin + end) / 2, 1.04, phase.task, ha="center")
        begin = end
    lengths.set_xlim(0, begin)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _smooth(values: Sequence[float], width: int = 25) -> list[float]:
    """The mean of the last `width` values, at each of them."""
    return [
        sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width)
        for i in range(len(values))
    ]


def _drafter(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.drafter


def main() -> int:
    """Measure, print the table, draw the picture."""
    args = _arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = {"method": "del", "statistics": args.statistics, "decay": args.decay}
    if args.exits:
        config["exits"] = args.exits
    phases = {}
    with engine(config, requests=1, model=resolve(args.model)) as llm:
        drafter = _drafter(llm)
        exits, num_layers = drafter.exits, drafter.num_layers
        for stop in args.stop:
            drafter.options = drafter.options.model_copy(update={"stop": stop})
            drafter.forget()
            phases[stop] = measure(llm, args.tasks, args.num_problems)
    print(
        f"{args.model}, {num_layers} layers, {args.num_problems} questions per task, "
        f"one at a time, greedy; {args.statistics} statistics, decay {args.decay:g}; "
        f"{hardware()}\n"
    )
    for stop, own in phases.items():
        print(f"stop: {stop}\n\n{table(own, num_layers)}\n")
    print(comparison(phases, num_layers))
    if args.plot:
        plot(phases[args.stop[0]], exits, num_layers, args.plot)
        print(f"\npicture: {args.plot}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exits", description=__doc__
    )
    parser.add_argument(
        "--model",
        default=TARGET,
        help="a model trained for early exits (default: %(default)s)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        default=["add", "spell", "add", "spell"],
        metavar="TASK",
        help=f"in this order, one may come again: {', '.join(TASKS)} "
        "(default: add spell add spell)",
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=60,
        help="questions per task (default: %(default)s)",
    )
    parser.add_argument(
        "--statistics",
        choices=["shared", "request"],
        default="shared",
        help="shared carries what was learned from one question to the next "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--decay",
        type=float,
        default=0.95,
        help="of older statistics, per round (default: %(default)s)",
    )
    parser.add_argument(
        "--exits", type=int, nargs="+", metavar="LAYER", help="default: DEL's own"
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        choices=get_args(Del.model_fields["stop"].annotation),
        default=[Del.model_fields["stop"].default],
        metavar="RULE",
        help="what ends a draft: both, confidence, length or gain (default: DEL's own)",
    )
    parser.add_argument(
        "--plot", type=Path, help="file for the picture; its ending says which kind"
    )
    args = parser.parse_args()
    if args.num_problems < 1:
        parser.error("--num-problems: at least 1")
    if args.plot and len(args.stop) > 1:
        parser.error("--plot: a picture is of one rule, and --stop names several")
    if args.plot:
        try:
            check_plotting()
        except ValueError as error:
            parser.error(str(error))
    return args


if __name__ == "__main__":
    sys.exit(main())
