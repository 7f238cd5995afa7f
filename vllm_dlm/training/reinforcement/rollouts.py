# SPDX-License-Identifier: Apache-2.0
"""Roll-outs: answers that a network draws while it is trained, with their trajectories.

The strategies that decide are those that serve (`vllm_dlm.strategies`), so that an
engine asked with `Decoder.options` goes the same way. Tokens are drawn with Gumbel
noise at a temperature; a token's confidence is its untempered probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vllm_dlm.messages import unknown
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import (
    Context,
    Strategy,
    View,
    best_masked,
    numeric_fields,
)
from vllm_dlm.training.reinforcement.rollout_rows import RollOuts, empty_rows

LogitsAt: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids [R, L], valid [R, L] bool, where [R, L] bool) -> logits [N, V] float32 of the N
positions of `where`, row by row from the left."""

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("static", {}),
    "eoser": ("eoser", {}),
    "ass": ("ass", {}),
    "eoser-ass": ("eoser", {"schedule": "doubling"}),
    "threshold": ("threshold", {}),
    "entropy": ("entropy", {}),
}
"""Name -> strategy and parameters that the name stands for."""


@dataclass(frozen=True)
class Decoder:
    """How answers are decoded.

    Args:
        name: of `DECODERS`.
        params: further parameters of its strategy.
        block_length: positions of a block; None takes the canvas as one block.
        tokens_per_step: for decoders that follow a schedule; None is 1.
        temperature: of the draws; 0 takes the most probable tokens.

    Raises:
        ValueError: a value that the decoder cannot have.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    block_length: int | None = None
    tokens_per_step: int | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in DECODERS:
            raise ValueError(f"decoder: {unknown(self.name, DECODERS)}")
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is below 0")
        for name in ("block_length", "tokens_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is below 1")
        rule = self._rule
        params = rule.Params(**self._config)
        if self.tokens_per_step is not None and not rule.follows_schedule(params):
            raise ValueError(
                f"the decoder {self.name} decides by itself how many tokens a step "
                "writes: leave tokens_per_step out"
            )
        if rule.scope == "canvas" and self.block_length is not None:
            raise ValueError(
                f"the decoder {self.name} takes the whole canvas as one block: leave "
                "block_length out"
            )

    @property
    def _rule(self) -> type[Strategy]:
        return STRATEGIES[DECODERS[self.name][0]]

    @property
    def _config(self) -> dict[str, Any]:
        return {**DECODERS[self.name][1], **self.params}

    def strategy(self, canvas: int, device: torch.device) -> Strategy:
        """The strategy that decides, for blocks of a canvas of so many positions.

        Raises:
            ValueError: with its parameters it reads or does what roll-outs have not.
        """
        params = self._rule.Params(**self._config)
        block_length = self.block_length or canvas
        strategy = self._rule(params, block_length, Context(device, "the network"))
        if strategy.needs - {"entropy", "margin"} or strategy.may_rewrite:
            raise ValueError(
                f"the decoder {self.name} with {dict(self.params)} reads "
                f"{', '.join(sorted(strategy.needs))}: roll-outs have the confidence, "
                "the entropy and the margin"
            )
        return strategy

    @property
    def asks_for_ends(self) -> bool:
        """Whether it matters to it which tokens end a text."""
        return self._rule.name == "eoser"

    def steps_per_block(self, canvas: int) -> int:
        """Steps of the schedule for a block."""
        block_length = self.block_length or canvas
        return -(-block_length // (self.tokens_per_step or 1))

    def options(self, canvas: int) -> dict[str, Any]:
        """The same as a request's options, without temperature."""
        name, _ = DECODERS[self.name]
        options: dict[str, Any] = {
            "strategy": name,
            "strategy_config": self._config,
            "block_length": self.block_length or "canvas",
        }
        if self.tokens_per_step is not None:
            options["steps_per_block"] = self.steps_per_block(canvas)
        return {key: value for key, value in options.items() if value != {}}


@torch.no_grad()
def roll_out(
    logits_at: LogitsAt,
    prompts: Sequence[Sequence[int]],
    *,
    canvas: int,
    decoder: Decoder,
    mask_id: int,
    end_id: int,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    attention_block: int | None = None,
    stop_at_end: bool = False,
) -> RollOuts:
    """Decode an answer to each prompt.

    What a row becomes depends on its own prompt and seed alone, whatever other rows
    there are.

    Args:
        logits_at: the network.
        prompts: token ids of R prompts.
        canvas: positions of each answer.
        decoder: how to decode.
        mask_id: token id of the mask, which is never written.
        end_id: token id of the end of a text.
        seeds: R seeds of the noise, for a temperature above 0.
        device: of the network.
        attention_block: block of a block-causal network, which counts blocks from the
            row's start; None counts them from the canvas's.
        stop_at_end: Leave masks behind the end of a text whose tokens are all written,
            as an engine does.
    """
    device = torch.device(device)
    block_length = decoder.block_length or canvas
    if attention_block is not None and block_length != attention_block:
        raise ValueError(
            f"block_length {block_length} of a network whose blocks have "
            f"{attention_block} positions: set block_length to {attention_block}"
        )
    rows = empty_rows(prompts, canvas, mask_id, end_id, device)
    noise = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    ends = rows.prompt_lengths + canvas
    starts = rows.prompt_lengths
    if attention_block is not None:
        starts = starts - starts % block_length
    strategy = decoder.strategy(canvas, device)
    names = numeric_fields(strategy.Params)
    values = [getattr(strategy.params, name) for name in names]
    row_params = {
        name: torch.full((len(prompts),), value, device=device)
        for name, value in zip(names, values, strict=True)
    }
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    count = torch.zeros_like(rows.prompt_lengths)
    first_entropy: Tensor | None = None
    for first in range(0, int((ends - starts).max()), block_length):
        columns = starts[:, None] + first + torch.arange(block_length, device=device)
        inside = columns < ends[:, None]
        places = columns.clamp(max=rows.ids.shape[1] - 1)
        state = {
            name: torch.full(
                (len(prompts), *kept.shape), kept.fill, dtype=kept.dtype, device=device
            )
            for name, kept in strategy.state.items()
        }
        step, masks_at_first = 0, None
        while True:
            block = rows.ids.gather(1, places)
            masked = (block == mask_id) & inside & ~done[:, None]
            if not masked.any():
                break
            if masks_at_first is None:
                masks_at_first = masked.sum(1)
            where = torch.zeros_like(rows.valid)
            where[masked.nonzero()[:, 0], places[masked]] = True
            # Rows that are finished need no forward.
            live = masked.any(1)
            logits = logits_at(rows.ids[live], rows.valid[live], where[live])
            logits = without_mask(logits, mask_id)
            found = _choose(logits, masked, decoder.temperature, noise)
            if first_entropy is None:
                first_entropy = found.entropy.sum(1) / masked.sum(1)
            view = _view(
                found,
                block,
                masked,
                inside,
                positions=columns - rows.prompt_lengths[:, None],
                step=step,
                masks_at_first=masks_at_first,
                steps=decoder.steps_per_block(canvas),
                state=state,
                end_id=end_id,
                canvas=canvas,
            )
            decision = strategy.select(view, row_params)
            commit = decision.commit & masked
            # The engine's rule: a step of a block with masks writes one at least.
            stuck = ~commit.any(1, keepdim=True)
            commit = commit | (best_masked(view) & stuck)
            state |= decision.state or {}
            chosen = places[commit]
            row_of = commit.nonzero()[:, 0]
            rows.ids[row_of, chosen] = found.tokens[commit]
            rows.logprobs[row_of, chosen] = found.logprobs[commit]
            rows.steps[row_of, chosen] = count[row_of]
            count += masked.any(1)
            step += 1
            if stop_at_end:
                done = done | _has_ended(rows, end_id)
    return RollOuts(**{**vars(rows), "first_entropy": first_entropy})


def without_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Logits [N, V] as float32, with a mask that is never drawn."""
    mask = torch.tensor([mask_id], device=logits.device)
    return logits.float().index_fill(-1, mask, -torch.inf)


@dataclass(frozen=True)
class _Found:
    """What one forward says of a block, [R, B] each; 0 where nothing is masked."""

    tokens: Tensor
    confidence: Tensor
    logprobs: Tensor
    entropy: Tensor
    margin: Tensor


def _choose(
    logits: Tensor, masked: Tensor, temperature: float, noise: list[torch.Generator]
) -> _Found:
    """Draw a token for each mask; `logits` [N, V] are those of the masks in order."""
    # Summed as the engine's kernels do: near 1, a tie there is a tie here.
    most, place = logits.max(-1, keepdim=True)
    weights = (logits - most).exp()
    total = 1 + weights.scatter(1, place, 0.0).sum(-1, keepdim=True, dtype=torch.double)
    drawn = logits
    if temperature > 0:
        # The logarithm of an exponential variable is minus a Gumbel one.
        waits = [
            torch.empty((n, logits.shape[1]), device=logits.device).exponential_(
                generator=generator
            )
            for n, generator in zip(masked.sum(1).tolist(), noise, strict=True)
        ]
        drawn = logits / temperature - torch.cat(waits).log()
    tokens = drawn.argmax(-1, keepdim=True)
    confidence = weights.gather(1, tokens) / total
    logprobs = logits.gather(1, tokens) - most - total.log()
    probabilities = weights / total.float()
    best = probabilities.topk(2, dim=-1).values

    def in_block(values: Tensor) -> Tensor:
        zeros = torch.zeros(masked.shape, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter(masked, values)

    return _Found(
        tokens=in_block(tokens[:, 0]),
        confidence=in_block(confidence[:, 0].float()),
        logprobs=in_block(logprobs[:, 0].float()),
        entropy=in_block(torch.special.entr(probabilities).sum(-1)),
        margin=in_block(best[:, 0] - best[:, 1]),
    )


def _view(
    found: _Found,
    block: Tensor,
    masked: Tensor,
    inside: Tensor,
    *,
    positions: Tensor,
    step: int,
    masks_at_first: Tensor,
    steps: int,
    state: dict[str, Tensor],
    end_id: int,
    canvas: int,
) -> View:
    """What a strategy sees of R blocks of B positions."""
    candidate = torch.where(masked, found.tokens, block)
    scheduled = masks_at_first // steps + (step < masks_at_first % steps)
    decided = inside & ~masked & (positions >= 0)
    first = positions[:, 0].clamp(min=0)
    return View(
        tokens=block,
        masked=masked,
        valid=inside,
        decided=decided,
        positions=positions,
        candidate=candidate,
        confidence=found.confidence,
        is_eos=candidate == end_id,
        step=torch.full_like(masks_at_first, step),
        scheduled=scheduled.clamp(min=1),
        steps=torch.full_like(masks_at_first, steps),
        progress=(first + decided.sum(1)) / canvas,
        state=state,
        entropy=found.entropy,
        margin=found.margin,
    )


def _has_ended(rows: RollOuts, end_id: int) -> Tensor:
    """[R] bool: whether an end stands with no mask to its left."""
    until = rows.to_end(end_id)
    has_end = ((rows.ids == end_id) & until).any(1)
    return has_end & ~((rows.ids == rows.mask_id) & until).any(1)
