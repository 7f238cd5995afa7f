# SPDX-License-Identifier: Apache-2.0
"""Prophet: go on step by step until the model knows, then write all that is left.

The gap of a position is the logit of its most probable token less that of the next one.
A step that finds a mean gap of at least a threshold writes every mask of the canvas.
The threshold falls with time t = (s + 1) / S in step s of S: `early` where t <
`early_until`, `middle` where t < `middle_until`, then `late`. Looked at are the
`answer_width` positions from `answer_start` on; without a start, the masks whose token
does not end the text, or, if there are none, all masks.

Until then the canvas is written as `static` writes it in blocks: spans of `span`
positions one after the other, each in its share of the steps.

Source: Prophet, arXiv 2508.19982, and pixeli99/Prophet's code, which forces a text into
the canvas, left of the answer, so that the answer's positions are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from vllm_dlm.strategies.base import Decision, Params, Strategy, View, given, top_of
from vllm_dlm.strategies.presets import Preset


def _threshold(default: float, when: str) -> float:
    text = f"Mean gap, in nats, at which the rest is written {when}. Lower is faster."
    return Field(default=default, ge=0.0, le=1e6, description=text)


def _until(default: float, phase: str) -> float:
    text = f"Share of the steps at which the {phase} phase ends."
    return Field(default=default, ge=0.0, le=1.0, description=text)


class ProphetParams(Params):
    """Parameters of `Prophet`."""

    presets: ClassVar[Mapping[str, Preset]] = {
        "paper": Preset(
            {"early": 7.5, "middle": 5.0, "late": 2.5, "span": 32},
            "pixeli99/Prophet, README.md",
            "max_tokens 256 and steps 256",
        ),
        "gsm8k": Preset(
            {"early": 7.5, "middle": 5.0, "late": 2.5, "span": 32}
            | {"answer_start": 204, "answer_width": 5},
            "pixeli99/Prophet, eval.sh",
            "max_tokens 256, steps 256 and the text `The answer is` forced to 200",
        ),
    }

    early: float = _threshold(7.5, "in the first phase")
    middle: float = _threshold(5.0, "in the second phase")
    late: float = _threshold(2.5, "in the last phase")
    early_until: float = _until(0.33, "first")
    middle_until: float = _until(0.67, "second")
    span: int = Field(
        default=32,
        ge=1,
        le=1_000_000,
        description="Positions that are written before those right of them.",
    )
    answer_start: int = Field(
        default=-1,
        ge=-1,
        le=1_000_000,
        description="First output position that is looked at, where a task has its "
        "answer in a known place; -1 looks at all masks but those of padding.",
    )
    answer_width: int = Field(
        default=5,
        ge=1,
        le=1_000_000,
        description="Positions that are looked at from `answer_start` on.",
    )

    @model_validator(mode="after")
    def _phases_in_order(self) -> ProphetParams:
        if self.early_until > self.middle_until:
            raise ValueError(
                f"early_until is {self.early_until:g}, but middle_until is "
                f"{self.middle_until:g}: the first phase ends first"
            )
        return self


class Prophet(Strategy):
    """Write as `static`, and all masks once the model is sure enough on average."""

    name = "prophet"
    paper = "arXiv 2508.19982 (Prophet)"
    summary = "a fixed number of tokens per step, then the whole rest at once"
    Params = ProphetParams
    needs = frozenset({"probabilities"})
    logit_rows = "block"
    scope = "canvas"
    schedule = True

    def select(self, view: View, row_params: Mapping[str, torch.Tensor]) -> Decision:
        start = row_params["answer_start"][:, None]
        end = start + row_params["answer_width"][:, None]
        answer = (view.positions >= start) & (view.positions < end) & view.valid
        text = view.masked & ~view.is_eos
        text = torch.where(text.any(dim=1, keepdim=True), text, view.masked)
        looked_at = torch.where(start < 0, text, answer)
        gaps = torch.where(looked_at, gap(view), 0.0)
        count = looked_at.sum(dim=1)
        mean = gaps.sum(dim=1) / count.clamp(min=1)

        time = (view.step + 1) / view.steps
        early = time < row_params["early_until"]
        middle = time < row_params["middle_until"]
        least = torch.where(middle, row_params["middle"], row_params["late"])
        least = torch.where(early, row_params["early"], least)
        knows = (mean >= least) & (count > 0)
        step = _static_step(view, row_params["span"])
        return Decision(torch.where(knows[:, None], view.masked, step))


def gap(view: View) -> torch.Tensor:
    """[R, B] float32: by how much the best logit exceeds the next; 0 if not read."""
    best, _ = given(view.probabilities, "probabilities").top(2)
    if best.shape[-1] < 2:  # No position is read, or there is but one token.
        return torch.zeros(view.masked.shape, device=view.masked.device)
    logits = best.clamp(min=1e-38).log()  # So a gap is at most 87.
    return logits[..., 0] - logits[..., 1]


def _static_step(view: View, span: torch.Tensor) -> torch.Tensor:
    """[R, B] bool: what `static` writes in the leftmost span with masks; `span` [R]."""
    width = view.masked.shape[1]
    place = torch.arange(width, device=view.masked.device)
    first = torch.where(view.masked, place, width).amin(dim=1)
    number = first // span
    in_span = (place // span[:, None] == number[:, None]) & view.valid
    size = in_span.sum(dim=1)
    # Each span has the same share of the steps, and begins when those before are done.
    steps = (view.steps // ((width + span - 1) // span)).clamp(min=1)
    step = (view.step - number * steps).clamp(min=0)
    count = size // steps + (step < size % steps)
    return top_of(view.masked & in_span, view.confidence, count.clamp(min=1))
