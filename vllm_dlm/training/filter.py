# SPDX-License-Identifier: Apache-2.0
"""Train Learn2PD's filter on traces: `vllm-dlm train-filter`.

Two layers, BCE, AdamW at 3e-3, as in the paper (arXiv 2509.25188). Differences: only
positions still masked count, since only they can be written; the cut is calibrated on
held-out blocks, so that at the default threshold at most the wanted share of wrong
positions is accepted; and steps are on small batches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vllm_dlm.model_executor.traces import IGNORED, RIGHT, Traces
from vllm_dlm.strategies.learn2pd_filter import Filter

BATCH_ROWS = 512
"""Trace rows of a step: too few for torch to share among threads, which a server that
learns while it serves needs for itself."""
THRESHOLD = 0.96
"""The strategy's default cut, which every trained filter is calibrated to."""


@dataclass(frozen=True)
class Report:
    """How a filter does on held-out blocks, beside the threshold rule."""

    rows: int
    """Trace rows in all."""
    blocks: int
    """Decoded blocks they come from."""
    false_positive_rate: float
    """Share of wrong positions that the filter accepts."""
    accepted: float
    """Share of right positions that the filter accepts."""
    accepted_by_threshold: float
    """The same for the rule confidence >= 0.9."""

    def __str__(self) -> str:
        return (
            f"{self.rows} steps of {self.blocks} blocks; on held-out blocks the filter "
            f"accepts {self.accepted:.1%} of the final tokens "
            f"(threshold 0.9: {self.accepted_by_threshold:.1%}) and "
            f"{self.false_positive_rate:.2%} of the others"
        )


def train_filter(
    traces: Traces,
    *,
    bound: float = 0.01,
    steps: int = 1500,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Filter, Report]:
    """Train and calibrate a filter.

    Args:
        traces: rows of at least ten blocks.
        bound: largest share of wrong positions accepted, on held-out blocks.
        steps: optimizer steps, of `BATCH_ROWS` rows each.
        seed: of the split and the initial weights.
        progress: show a bar.

    Raises:
        ValueError: too few traces, or none with a masked position.
    """
    blocks = np.unique(traces.block)
    if len(blocks) < 10:
        raise ValueError(
            f"{len(blocks)} blocks are too few to train and test a filter on; "
            "collect at least 10, better some hundreds"
        )
    rng = np.random.default_rng(seed)
    held_out = rng.permutation(blocks)[: max(len(blocks) // 5, 2)]
    is_test = np.isin(traces.block, held_out)
    confidence = torch.from_numpy(traces.confidence)
    counts = torch.from_numpy(traces.label != IGNORED)
    right = torch.from_numpy(traces.label == RIGHT)
    train, test = torch.from_numpy(~is_test), torch.from_numpy(is_test)
    if not (counts[train].any() and counts[test].any()):
        raise ValueError("the traces hold no masked position that was decided later")

    filter = _fit(confidence[train], right[train], counts[train], steps, seed, progress)
    logits = filter.apply(confidence)
    # Calibrate on one half of the held-out blocks, report on the other.
    halves = torch.from_numpy(np.isin(traces.block, held_out[::2])) & test
    wrong = logits[halves][counts[halves] & ~right[halves]]
    cut = _cut(wrong, logits[halves], bound)
    level = torch.logit(torch.tensor(THRESHOLD))
    filter = replace(filter, b2=filter.b2 - cut + level, threshold=THRESHOLD)

    rest = test & ~halves
    accepts = filter.apply(confidence)[rest] > level
    counts, right, sure = counts[rest], right[rest], confidence[rest] >= 0.9
    report = Report(
        rows=len(traces),
        blocks=len(blocks),
        false_positive_rate=_share(accepts, counts & ~right),
        accepted=_share(accepts, counts & right),
        accepted_by_threshold=_share(sure, counts & right),
    )
    return replace(filter, false_positive_rate=report.false_positive_rate), report


def _fit(
    confidence: torch.Tensor,
    right: torch.Tensor,
    counts: torch.Tensor,
    steps: int,
    seed: int,
    progress: bool,
) -> Filter:
    width = confidence.shape[1]
    generator = torch.Generator().manual_seed(seed)

    def init(*shape: int) -> torch.Tensor:
        bound = width**-0.5
        values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        return values.requires_grad_()

    w1, b1, w2, b2 = init(width, width), init(width), init(width, width), init(width)
    optimizer = torch.optim.AdamW([w1, b1, w2, b2], lr=3e-3, weight_decay=1e-4)
    target, weight = right.float(), counts.float()
    for _ in tqdm(range(steps), desc="filter", disable=not progress):
        rows = torch.randint(len(target), (BATCH_ROWS,), generator=generator)
        logits = torch.relu(confidence[rows] @ w1.T + b1) @ w2.T + b2
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target[rows], weight[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Filter(w1.detach(), b1.detach(), w2.detach(), b2.detach())


def _cut(wrong: torch.Tensor, logits: torch.Tensor, bound: float) -> torch.Tensor:
    """Logit above which at most `bound` of the wrong positions lie."""
    if len(wrong) == 0:
        return logits.amin()
    allowed = int(bound * len(wrong))
    return wrong.sort(descending=True).values[allowed]


def _share(chosen: torch.Tensor, among: torch.Tensor) -> float:
    return float((chosen & among).sum() / among.sum().clamp(min=1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm train-filter`."""
    parser.add_argument("traces", help="file written by `vllm-dlm traces`")
    parser.add_argument(
        "--out",
        help="filter file to write (default: where a server looks for it, in the "
        "folder of learned filters)",
    )
    parser.add_argument(
        "--false-positive-rate",
        type=float,
        default=0.01,
        metavar="RATE",
        help="largest share of wrong positions accepted (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=1500, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Train a filter from a trace file and save it."""
    from vllm_dlm.config import DlmConfig
    from vllm_dlm.training.traces import load_traces

    traces, facts = load_traces(args.traces)
    filter, report = train_filter(
        traces,
        bound=args.false_positive_rate,
        steps=args.steps,
        seed=args.seed,
        progress=True,
    )
    print(report)
    filter = replace(
        filter,
        model_key=facts["model_key"],
        cache=facts["cache"],
        source=f"{report.rows} steps of {facts['source']}",
    )
    path = (
        Path(args.out) if args.out else filter_path(DlmConfig().filters_path(), filter)
    )
    filter.save(path)
    print(f"saved {path}")
    return 0


def filter_path(folder: Path, filter: Filter) -> Path:
    """Where `find_filter` looks for a learned filter."""
    return (
        folder / filter.model_key / f"b{filter.block_length}-{filter.cache}.safetensors"
    )
