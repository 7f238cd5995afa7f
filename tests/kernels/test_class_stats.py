# SPDX-License-Identifier: Apache-2.0
"""Statistics and draws by classes of tokens: loops, plain torch, cut vocabularies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dlm.kernels.class_stats import (
    TokenClasses,
    _draws_reference,
    class_draws,
    class_stats,
    class_stats_reference,
)
from vllm_dlm.kernels.draw import draw, row_key

CPU = torch.device("cpu")


def some_classes(vocab: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Classes of very different sizes; tokens of none; a class without tokens."""
    generator = np.random.default_rng(seed)
    of = generator.geometric(0.4, vocab) - 2
    of[of >= num_classes - 1] = 0
    of[generator.integers(vocab)] = num_classes - 2
    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
@pytest.mark.parametrize("vocab", [3, 300, 9001])
def test_numbers_are_those_of_the_classes_alone(odd_logits, vocab, dtype, scale):
    logits = odd_logits(vocab, 12, vocab, dtype)
    classes = TokenClasses.of(some_classes(vocab, 9), 9, CPU)
    got = class_stats(logits, classes, scale)
    want = class_stats_reference(logits, classes, scale)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-5)
    assert torch.equal(got[..., :2], want[..., :2])
    one = class_stats(logits[3:4], classes, scale)
    assert torch.equal(one[0], got[3])


def test_a_row_of_one_class_is_a_row(odd_logits, oracle, assert_true):
    from vllm_dlm.kernels.token_stats import finished

    logits = odd_logits(1, 8, 4000)
    classes = TokenClasses.of(np.zeros(4000, np.int64), 1, CPU)
    got = finished(class_stats(logits, classes)[:, 0], True, True)
    assert_true(got, oracle(logits, [-1] * 8))


def seeds(count: int) -> tuple[torch.Tensor, ...]:
    rows = torch.arange(count)
    return rows * 7 + 1, rows + 3, rows % 4


def test_draws_of_one_class_are_draws(odd_logits):
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(2))
    classes = TokenClasses.of(np.zeros(5000, np.int64), 1, CPU)
    top, temperature = logits.amax(dim=1), torch.full((64,), 0.8)
    scores, tokens, own = class_draws(logits, classes, top, temperature, *seeds(64))
    zeros = torch.zeros(64)
    want = draw(
        logits, logits.argmax(dim=1), temperature, zeros.long(), zeros + 1, zeros,
        *seeds(64),
    )  # fmt: skip
    assert torch.equal(tokens[:, 0], want)
    assert torch.equal(own, logits.double().gather(1, tokens))
    assert (scores > -torch.inf).all()


@pytest.mark.parametrize("vocab", [3, 300, 9001])
def test_draws_are_those_of_plain_torch(odd_logits, vocab):
    logits = odd_logits(vocab, 12, vocab)
    classes = TokenClasses.of(some_classes(vocab, 9), 9, CPU)
    top = logits.nan_to_num(nan=-torch.inf).amax(dim=1)
    top = torch.where(top.isfinite(), top, 0.0)
    temperature = torch.full((12,), 0.7)
    scores, tokens, _ = class_draws(logits, classes, top, temperature, *seeds(12))
    want, places = _draws_reference(
        logits, classes, top, temperature, row_key(*seeds(12))
    )
    torch.testing.assert_close(scores.float(), want, rtol=1e-5, atol=1e-5)
    drawn = want > -torch.inf
    assert torch.equal(tokens[drawn], classes.tokens[places[drawn]].long())


@pytest.mark.parametrize("cuts", [[1], [100, 200], [0, 299]])
def test_ranks_merge_to_whole_rows(odd_logits, on_ranks, cuts):
    logits = odd_logits(5, 6, 300)
    of = some_classes(300, 9)
    whole = class_stats(logits, TokenClasses.of(of, 9, CPU))

    def stats(local, shard):
        return class_stats(local, TokenClasses.of(of, 9, CPU, shard), shard=shard)

    for got in on_ranks(cuts, 3, logits, stats):
        usable = whole[..., 0].isfinite()
        torch.testing.assert_close(got[usable], whole[usable], rtol=1e-6, atol=2e-5)
        assert torch.equal(got[..., 0], whole[..., 0])

    top, temperature = torch.zeros(6), torch.ones(6)
    classes = TokenClasses.of(of, 9, CPU)
    scores, tokens, own = class_draws(logits, classes, top, temperature, *seeds(6))

    def draws(local, shard):
        mine = TokenClasses.of(of, 9, CPU, shard)
        return torch.stack(
            [
                part.double()
                for part in class_draws(
                    local, mine, top, temperature, *seeds(6), shard=shard
                )
            ]
        )

    drawn = scores > -torch.inf
    for got in on_ranks(cuts, 3, logits, draws):
        assert torch.equal(got[0], scores)
        assert torch.equal(got[1][drawn], tokens[drawn].double())
        assert torch.equal(got[2][drawn], own[drawn])
