# SPDX-License-Identifier: Apache-2.0
"""SVDecode's formula (arXiv 2509.15888), in torch alone.

With p the tuned model's distribution, q the base's, and r = p / q, the direction is

    delta_i = -p_i (ln r_i - sum_j p_j ln r_j),

minus the gradient of KL(p || q) in the tuned model's logits: it leads to the base.
Logits become z + mu delta, so a negative mu leads away from the base, further along
the way that tuning went. All is computed in float32.
"""

from __future__ import annotations

import torch

PRUNED = 1e4
"""Taken from the logit of a token that is too improbable. No such token is ever drawn
beside one that is not; but where a request allows no others (a grammar, a list of
tokens), they keep their order, where -inf would leave nothing to draw."""

EPSILON = 1e-12
"""Added to |delta|^2, as in the paper."""


def direction(tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The direction to the base, [..., V].

    Args:
        tuned: log-probabilities of the tuned model, [..., V] in float32.
        base: the same of the base.
    """
    p = tuned.exp()
    # Where p is 0 so is p ln r, whatever the base says there.
    log_ratio = torch.where(p > 0, tuned - base, 0)
    mean = (p * log_ratio).sum(-1, keepdim=True)
    return -p * (log_ratio - mean)


def is_kept(tuned: torch.Tensor, keep: float) -> torch.Tensor:
    """Tokens of at least `keep` of the best one's probability, bool [..., V].

    Args:
        tuned: log-probabilities of the tuned model, [..., V].
        keep: 0 keeps all tokens, 1 the best one.
    """
    p = tuned.exp()
    return p >= keep * p.amax(-1, keepdim=True)


def steer(
    tuned: torch.Tensor, base: torch.Tensor, mu: float, keep: float
) -> torch.Tensor:
    """Steered logits, [..., V] in float32; with `mu` and `keep` 0 the tuned model's.

    Args:
        tuned: logits of the tuned model, [..., V].
        base: the same of the base.
        mu: how far; negative is away from the base.
        keep: see `is_kept`; other tokens lose `PRUNED`.
    """
    tuned = tuned.float()
    log_p = tuned.log_softmax(-1)
    steered = tuned + mu * direction(log_p, base.float().log_softmax(-1))
    return torch.where(is_kept(log_p, keep), steered, steered - PRUNED)


def best_mu(
    tuned: torch.Tensor, base: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """For each position the mu that takes the tuned model to the right token, [N].

    To first order: the length, along `direction`, of the way from p to that token.

    Args:
        tuned: log-probabilities of the tuned model, [N, V] in float32.
        base: the same of the base.
        tokens: the right tokens, [N].
    """
    delta = direction(tuned, base)
    wanted = torch.nn.functional.one_hot(tokens, tuned.shape[-1]) - tuned.exp()
    return (wanted * delta).sum(-1) / (delta.square().sum(-1) + EPSILON)
