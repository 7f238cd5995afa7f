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

import numpy as np
import torch
from tqdm import tqdm

from vllm_dlm.cli.arguments import count, output_file
from vllm_dlm.learn2pd.recorder import IGNORED, RIGHT, Traces
from vllm_dlm.strategies.learn2pd import FALLBACK_CONFIDENCE
from vllm_dlm.strategies.learn2pd_files import filter_path
from vllm_dlm.strategies.learn2pd_filter import Filter

BATCH_ROWS = 128
"""Trace rows of a step: products so small that BLAS starts no threads either."""
LEARNING_RATE = 3e-3
THRESHOLD = 0.96
"""The strategy's default cut, which every trained filter is calibrated to."""
PAPER_CUT = 0.9
"""The sigmoid above which the paper counts a position as accepted."""


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
    """Share of right positions that the rule confidence >= 0.9 accepts."""
    wrong_of_accepted: float = 0.0
    """Share of wrong ones among the positions that the filter accepts."""
    wrong_at_90: float = 0.0
    """The same as the paper measures it: where the sigmoid of the filter, before its
    cut is calibrated, is above 0.9."""

    def __str__(self) -> str:
        return (
            f"{self.rows} steps of {self.blocks} blocks; on held-out blocks the filter "
            f"accepts {self.accepted:.1%} of the final tokens "
            f"(threshold 0.9: {self.accepted_by_threshold:.1%}) and "
            f"{self.false_positive_rate:.2%} of the others; of what it accepts, "
            f"{self.wrong_of_accepted:.3%} is wrong (before calibration, at a sigmoid "
            f"of 0.9: {self.wrong_at_90:.3%})"
        )


def train_filter(
    traces: Traces,
    *,
    bound: float = 0.01,
    steps: int = 6000,
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
    held_out = rng.permutation(blocks)[: len(blocks) // 2]
    is_test = np.isin(traces.block, held_out)
    confidence = torch.from_numpy(traces.confidence)
    counts = torch.from_numpy(traces.label != IGNORED)
    right = torch.from_numpy(traces.label == RIGHT)
    train, test = torch.from_numpy(~is_test), torch.from_numpy(is_test)
    if not (counts[train].any() and counts[test].any()):
        raise ValueError("the traces hold no masked position that was decided later")

    filter = _fit(
        traces.confidence[~is_test],
        (traces.label == RIGHT)[~is_test].astype(np.float32),
        (traces.label != IGNORED)[~is_test].astype(np.float32),
        steps,
        rng,
        progress,
    )
    logits = filter.apply(confidence)
    # Calibrate on one half of the held-out blocks, report on the other.
    halves = torch.from_numpy(np.isin(traces.block, held_out[::2])) & test
    wrong = logits[halves][counts[halves] & ~right[halves]]
    cut = _cut(wrong, logits[halves], bound)
    level = torch.logit(torch.tensor(THRESHOLD))
    filter = replace(filter, b2=filter.b2 - cut + level, threshold=THRESHOLD)

    rest = test & ~halves
    at_90 = logits[rest] > torch.logit(torch.tensor(PAPER_CUT))
    accepts = filter.apply(confidence)[rest] > level
    sure = confidence[rest] >= FALLBACK_CONFIDENCE
    counts, right = counts[rest], right[rest]
    report = Report(
        rows=len(traces),
        blocks=len(blocks),
        false_positive_rate=_share(accepts, counts & ~right),
        accepted=_share(accepts, counts & right),
        accepted_by_threshold=_share(sure, counts & right),
        wrong_of_accepted=_share(~right, counts & accepts),
        wrong_at_90=_share(~right, counts & at_90),
    )
    return replace(filter, false_positive_rate=report.false_positive_rate), report


def _fit(
    confidence: np.ndarray,
    right: np.ndarray,
    counts: np.ndarray,
    steps: int,
    rng: np.random.Generator,
    progress: bool,
) -> Filter:
    """AdamW on the binary cross-entropy of z = w2 relu(w1 c + b1) + b2.

    By hand in numpy: torch would share even these small products among threads, which
    a server that learns while it serves needs for itself.
    """
    width = confidence.shape[1]
    shapes = ((width, width), (width,), (width, width), (width,))
    bound = width**-0.5
    weights = [rng.uniform(-bound, bound, shape).astype(np.float32) for shape in shapes]
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    for step in tqdm(range(1, steps + 1), desc="filter", disable=not progress):
        w1, b1, w2, b2 = weights
        rows = rng.integers(len(right), size=BATCH_ROWS)
        c = confidence[rows]
        hidden = np.maximum(c @ w1.T + b1, 0)
        z = np.clip(hidden @ w2.T + b2, -30, 30)
        d_z = (1 / (1 + np.exp(-z)) - right[rows]) * counts[rows] / counts[rows].size
        d_hidden = (d_z @ w2) * (hidden > 0)
        gradients = (d_hidden.T @ c, d_hidden.sum(0), d_z.T @ hidden, d_z.sum(0))
        for w, g, m, v in zip(weights, gradients, first, second, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
            w -= LEARNING_RATE * (update + 1e-4 * w)
    w1, b1, w2, b2 = weights
    return Filter(
        torch.from_numpy(w1),
        torch.from_numpy(b1),
        torch.from_numpy(w2),
        torch.from_numpy(b2),
    )


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
        type=output_file,
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
        "--steps",
        type=count,
        default=6000,
        help="optimizer steps (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Train a filter from a trace file and save it."""
    from vllm_dlm.config.options import DlmConfig
    from vllm_dlm.learn2pd.collect import load_traces

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
    path = args.out or filter_path(DlmConfig().filters_path(), filter)
    filter.save(path)
    print(f"saved {path}")
    return 0
