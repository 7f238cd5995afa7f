# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma's sampler held to a pattern, one request at a time, in plain loops.

The rule of docs/strategies/renoise.md over transformers' own network, whose text and
canvas are computed anew in each step. Distributions are over tokens, in float64, and
nothing is in classes. Nothing of this package is used: the caller says which token may
follow which state, and gives the random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from reference.diffusion_gemma import Noise
from transformers import DiffusionGemmaForBlockDiffusion

_NEVER = -torch.inf


@dataclass(frozen=True)
class Moves:
    """Which texts match: S states, V tokens."""

    follows: torch.Tensor
    """[S, V] int64: the state behind a token; -1 where it may not stand."""
    accepting: torch.Tensor
    """[S] bool."""
    ends: list[int]
    """Tokens that end a text; behind one, only such tokens may stand."""
    start: int = 0

    def fewest(self) -> torch.Tensor:
        """[S] int64: tokens to a text that matches, at least; large for none."""
        found = torch.where(self.accepting, 0, 1 << 30)
        for _ in range(len(found)):
            behind = torch.where(self.follows >= 0, found[self.follows], 1 << 30)
            found = torch.minimum(found, behind.amin(dim=1) + 1)
        return found

    def behind(self, weights: torch.Tensor, end: torch.Tensor, best: bool):
        """[n + 1, S]: logs of the largest weight, or of the sum, of all that may follow
        a state.

        Args:
            weights: [n, V], logs.
            end: [S] bool: states that may stand behind the last position.
        """
        rows = [torch.where(end, 0.0, _NEVER).double()]
        for own in weights.flip(0):
            each = own + self._next(rows[0])
            rows.insert(0, each.amax(dim=1) if best else each.logsumexp(dim=1))
        return torch.stack(rows)

    def _next(self, values: torch.Tensor) -> torch.Tensor:
        """[S, V]: of [S], that of the state that follows."""
        return torch.where(self.follows >= 0, values[self.follows], _NEVER)

    def path(self, state: int, scores: torch.Tensor, behind: torch.Tensor) -> list[int]:
        """The tokens of the best scores [n, V], from the left."""
        tokens = []
        for own, rest in zip(scores, behind[1:], strict=True):
            tokens.append(int((own + self._next(rest)[state]).argmax()))
            state = int(self.follows[state, tokens[-1]])
        return tokens

    def posterior(
        self, state: int, weights: torch.Tensor, behind: torch.Tensor
    ) -> torch.Tensor:
        """[n, V] float64: probabilities of tokens, given that the text matches."""
        here = torch.zeros(len(self.follows), dtype=torch.float64)
        here[state] = 1.0
        found = []
        for own, rest, whole in zip(weights, behind[1:], behind, strict=False):
            each = (own + self._next(rest) - whole[:, None]).exp().nan_to_num(0.0)
            each = torch.where(here[:, None] > 0, each * here[:, None], 0.0)
            found.append(each.sum(dim=0))
            here = torch.zeros_like(here)
            here.index_add_(0, self.follows.clamp(min=0).flatten(), each.flatten())
        return torch.stack(found)


def _one_end(scores: torch.Tensor, ends: list[int], value: torch.Tensor, at):
    """Scores [n, V] with one end of text in each row, the token `at` [n]."""
    scores = scores.clone()
    scores[:, ends] = _NEVER
    return scores.scatter(1, at[:, None], value[:, None])


@torch.no_grad()
def generate_matching(
    folder: str | Path,
    prompt: list[int],
    moves: Moves,
    max_tokens: int,
    noise: Noise,
    gumbel: Noise,
    temperature: float = 1.0,
    bias: dict[int, float] | None = None,
    bound: float | None = None,
) -> tuple[list[int], int]:
    """The tokens of a text, its end included, and the number of forwards.

    Args:
        noise, gumbel: as of `diffusion_gemma.generate`.
        bias: what is added to tokens' logits.
        bound: `entropy_bound`; None for the checkpoint's.
    """
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()
    config, length = model.generation_config, model.config.canvas_length
    steps = config.max_denoising_steps
    if bound is None:
        bound = config.sampler_config.entropy_bound
    fewest, ends = moves.fewest(), moves.ends
    written: list[int] = []
    state, forwards = moves.start, 0
    while len(written) < max_tokens:
        canvas_number = len(written) // length
        canvas, fed = noise(canvas_number, 0), None
        # Behind the longest text nothing has to match.
        size = min(length, max_tokens - len(written))
        end = fewest <= max_tokens - len(written) - size
        last, same_for = None, 0
        for step in range(steps):
            heat = config.t_min + (config.t_max - config.t_min) * (steps - step) / steps
            logits = model(
                input_ids=torch.tensor([prompt + written]),
                decoder_input_ids=canvas[None],
                self_conditioning_logits=fed,
            ).logits[0]
            forwards += 1
            for token, more in (bias or {}).items():
                logits[:, token] += more
            scores = (logits / heat).double()
            chances, entropy = scores.softmax(dim=1), torch.zeros(length).double()
            best, drawn = scores.argmax(dim=1), scores.argmax(dim=1)
            noisy = scores
            if temperature > 0:
                noisy = scores / temperature + gumbel(canvas_number, step)
                drawn = noisy.argmax(dim=1)

            text, own = scores[:size], scores[:size, ends]
            which = torch.tensor(ends)[own.argmax(dim=1)]
            weights = _one_end(text, ends, own.logsumexp(dim=1), which)
            most = moves.behind(weights, end, best=True)
            best[:size] = torch.tensor(moves.path(state, weights, most))
            total = moves.behind(weights, end, best=False)
            chances[:size] = moves.posterior(state, weights, total)
            drawn[:size] = best[:size]
            if temperature > 0:
                cooled = text / temperature
                of_ends = cooled[:, ends].logsumexp(dim=1)
                sums = moves.behind(
                    _one_end(cooled, ends, of_ends, which), end, best=False
                )
                tops = noisy[:size, ends].amax(dim=1)
                lots = _one_end(noisy[:size], ends, tops, which)
                drawn[:size] = torch.tensor(moves.path(state, lots, sums))
            entropy = torch.special.entr(chances).sum(dim=1)
            # The tokens that end a text share what the end has.
            ended = chances[:size, ends].sum(dim=1, keepdim=True)
            chances[:size, ends] = ended * own.softmax(dim=1)
            fed = chances.log().float()[None]

            order = entropy.sort(stable=True)
            smaller = order.values.cumsum(dim=0) - order.values
            accepted = torch.zeros(length, dtype=torch.bool)
            accepted[order.indices] = smaller <= bound
            canvas = torch.where(accepted, drawn, noise(canvas_number, step + 1))

            same_for = same_for + 1 if last is not None and best.equal(last) else 0
            last = best
            sure = entropy.mean() < config.confidence_threshold
            if same_for >= config.stability_threshold and sure:
                break
        assert last is not None
        for token in last[:size].tolist():
            written.append(token)
            state = int(moves.follows[state, token])
            if token in ends:
                return written, forwards
    return written, forwards
