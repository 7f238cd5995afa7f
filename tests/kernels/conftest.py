# SPDX-License-Identifier: Apache-2.0
"""What the tests of the kernels share: odd rows of logits, and what is true of them."""

import math
from collections.abc import Callable

import pytest
import torch

from vllm_dlm.kernels.shards import VocabShard
from vllm_dlm.kernels.token_stats import TokenStats

INF, NAN = float("inf"), float("nan")


def make_odd_logits(seed: int, rows: int, vocab: int, dtype=torch.float32):
    """Random rows with ties for the first place, NaN, -inf; a few full of these."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator) * 20
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    logits[torch.rand(rows, vocab, generator=generator) < 0.05] = NAN
    logits[torch.rand(rows, vocab, generator=generator) < 0.05] = -INF
    if vocab > 2:
        logits[:, vocab // 2] = logits.nan_to_num(nan=-INF).amax(dim=1)
    fate = torch.rand(rows, generator=generator)
    logits[fate < 0.06] = NAN
    logits[(fate >= 0.06) & (fate < 0.12)] = -INF
    logits[(fate >= 0.12) & (fate < 0.15), vocab - 1] = INF
    return logits


def true_stats(logits: torch.Tensor, bans: list[int]) -> TokenStats:
    """Statistics of each row in float64, from plain Python; bans: -1 for none."""
    rows = []
    for row, ban in zip(logits.double().tolist(), bans, strict=True):
        scores = {i: -INF if x != x else x for i, x in enumerate(row) if i != ban}
        best = max(scores.values(), default=-INF)
        token = min((i for i, x in scores.items() if x == best), default=0)
        if not math.isfinite(best):
            rows.append((token, -INF, 0.0, best, 0.0, 0.0))
            continue
        total = math.fsum(math.exp(x - best) for x in scores.values())
        logsumexp = best + math.log(total)
        logs = [x - logsumexp for x in scores.values() if x > -INF]
        others = [x for i, x in scores.items() if i != token]
        second = math.exp(max(others, default=-INF) - logsumexp)
        rows.append(
            (
                token,
                best - logsumexp,
                1 / total,
                logsumexp,
                -math.fsum(math.exp(x) * x for x in logs),
                1 / total - second,
            )
        )
    columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6).unbind(dim=1)
    return TokenStats(columns[0].long(), *columns[1:])


def check_stats(got: TokenStats, want: TokenStats, names=TokenStats._fields) -> None:
    """Up to float32 rounding; `want` as `true_stats` makes it."""
    for name in names:
        one, other = getattr(got, name), getattr(want, name)
        kind = {"argmax": torch.int64, "logsumexp": torch.float64}
        assert one.dtype == kind.get(name, torch.float32), name
        torch.testing.assert_close(
            one.cpu().to(other.dtype), other, rtol=1e-6, atol=2e-6, msg=name
        )


class Waiting(Exception):
    """A rank has come to a gather for which the other ranks' parts are not known."""

    def __init__(self, part: torch.Tensor) -> None:
        self.part = part


def run_ranks(
    cuts: list[int],
    padding: int,
    logits: torch.Tensor,
    function: Callable[[torch.Tensor, VocabShard], torch.Tensor],
) -> list[torch.Tensor]:
    """What each rank gets when the vocabulary is cut at `cuts`.

    The ranks run one after another, again and again: each time what all of them hand to
    their next gather is known, until a run comes to its end.
    """
    bounds = [0, *cuts, logits.shape[1]]
    sent: list[list[torch.Tensor]] = []  # per gather, of all ranks
    while True:
        results, fresh = [], []
        for first, last in zip(bounds, bounds[1:], strict=False):
            calls = iter([*sent, None])

            def gather(part: torch.Tensor, calls=calls) -> torch.Tensor:
                known = next(calls)
                if known is None:
                    raise Waiting(part)
                return torch.stack(known)

            local = torch.nn.functional.pad(
                logits[:, first:last], (0, padding), value=99
            )
            try:
                results.append(function(local, VocabShard(first, last - first, gather)))
            except Waiting as waiting:
                fresh.append(waiting.part)
        if not fresh:
            return results
        assert len(fresh) == len(bounds) - 1, "ranks gather unequally often"
        sent.append(fresh)


@pytest.fixture(scope="session")
def odd_logits():
    return make_odd_logits


@pytest.fixture(scope="session")
def oracle():
    return true_stats


@pytest.fixture(scope="session")
def assert_true():
    return check_stats


@pytest.fixture(scope="session")
def on_ranks():
    return run_ranks
