# SPDX-License-Identifier: Apache-2.0
"""Learn2PD's filter: a two-layer network from a block's confidences to acceptances.

z = w2 relu(w1 c + b1) + b2 for the confidences c of all B block positions; position i
may be written if sigmoid(z_i) exceeds a cut. A filter file is safetensors with the four
tensors in float32 and the other fields of `Filter` as metadata strings.
Source: arXiv 2509.25188.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vllm_dlm.files.tensor_files import (
    Rule,
    check_tensors,
    number_of,
    read_safetensors,
    write_safetensors,
)
from vllm_dlm.files.whole_files import MIB, BadFile, remembered

_WHAT = "filter"
_RULES = {"w1": Rule("H B"), "b1": Rule("H"), "w2": Rule("B H"), "b2": Rule("B")}
_WEIGHTS = tuple(_RULES)
_MOST_BYTES = 1024 * MIB
_MOST_TEXT = 1000
"""Characters of what a file says of itself."""


@dataclass(frozen=True, eq=False)
class Filter:
    """Weights of one filter (B block positions, H hidden units) and their history."""

    w1: torch.Tensor
    """[H, B]"""
    b1: torch.Tensor
    """[H]"""
    w2: torch.Tensor
    """[B, H]"""
    b2: torch.Tensor
    """[B]"""
    threshold: float = 0.96
    """Cut on sigmoid(z) that it was tuned for."""
    model_key: str = ""
    """Model whose confidences it was trained on; empty if unknown."""
    cache: str = ""
    """KV policy they were collected under; empty if unknown."""
    source: str = ""
    """What it was trained on, in words."""
    false_positive_rate: float = float("nan")
    """Share of wrongly accepted positions at `threshold`, on held-out text."""

    def __post_init__(self) -> None:
        found = tuple(tuple(getattr(self, name).shape) for name in _WEIGHTS)
        hidden, block_length = found[0] if len(found[0]) == 2 else (0, 0)
        shapes = ((hidden, block_length), (hidden,), (block_length, hidden))
        if not block_length or found != (*shapes, (block_length,)):
            raise ValueError(
                "a filter's w1, b1, w2, b2 must be [H, B], [H], [B, H], [B]; "
                f"got {', '.join(map(str, found))}"
            )

    @property
    def block_length(self) -> int:
        """B: it fits blocks of this length only."""
        return int(self.w1.shape[1])

    def apply(self, confidence: torch.Tensor) -> torch.Tensor:
        """Logits [R, B] of accepting each position, from confidences [R, B].

        Computed and returned in the weights' dtype. Positions beyond the canvas end
        must be 1.0.
        """
        confidence = confidence.to(self.w1.dtype)
        hidden = torch.relu(confidence @ self.w1.T + self.b1)
        return hidden @ self.w2.T + self.b2

    def to(self, device: torch.device, dtype: torch.dtype) -> Filter:
        """The same filter on `device` in `dtype`."""
        w1, b1, w2, b2 = (
            getattr(self, name).detach().to(device=device, dtype=dtype, copy=True)
            for name in _WEIGHTS
        )
        return replace(self, w1=w1, b1=b1, w2=w2, b2=b2)

    def calibrated(self, tau: float) -> Filter:
        """A filter that accepts at the cut `tau` what this one does at `threshold`.

        Tune a cut, then save `calibrated(0.96)`: it suits requests that set none.
        """
        levels = torch.tensor([tau, self.threshold], dtype=torch.float64).logit()
        shift = (levels[0] - levels[1]).to(self.b2)
        return replace(self, b2=self.b2 + shift, threshold=tau)

    def save(self, path: str | Path) -> None:
        """Write a filter file; a reader sees the old one or the new one, never half.

        Raises:
            ValueError: a weight is not finite, as after a training that diverged.
        """
        cpu = self.to(torch.device("cpu"), torch.float32)
        weights = {name: getattr(cpu, name) for name in _WEIGHTS}
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} of the filter holds NaN or infinite values")
        write_safetensors(
            path,
            weights,
            {
                "block_length": str(self.block_length),
                "model_key": self.model_key,
                "cache": self.cache,
                "threshold": repr(self.threshold),
                "source": self.source,
                "false_positive_rate": repr(self.false_positive_rate),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Filter:
        """Read a filter file, onto the CPU.

        Raises:
            ValueError: there is no such file, or it is not a sound filter file.
        """
        tensors, metadata = read_safetensors(path, _WHAT, _MOST_BYTES)
        block_length = check_tensors(tensors, _RULES, path, _WHAT)["B"]

        def number(name: str, default: float) -> float:
            return number_of(metadata, name, default, path, _WHAT)

        declared = metadata.get("block_length", str(block_length))
        threshold = number("threshold", 0.96)
        rate = number("false_positive_rate", math.nan)
        texts = {
            name: metadata.get(name, "") for name in ("model_key", "cache", "source")
        }
        problem = ""
        if declared != str(block_length):
            problem = f"block_length: {declared[:80]!r}, but b2 has {block_length}"
        elif not 0 < threshold < 1:
            problem = f"threshold: expected a number between 0 and 1, got {threshold}"
        elif not (math.isnan(rate) or 0 <= rate <= 1):
            problem = f"false_positive_rate: expected a share, got {rate}"
        for name, text in texts.items():
            if len(text) > _MOST_TEXT or not text.isprintable():
                problem = f"{name}: expected up to {_MOST_TEXT} printable characters"
        if problem:
            raise BadFile(_WHAT, path, problem)
        w1, b1, w2, b2 = (tensors[name].float() for name in _WEIGHTS)
        return cls(
            w1,
            b1,
            w2,
            b2,
            threshold=threshold,
            model_key=texts["model_key"],
            cache=texts["cache"],
            source=texts["source"],
            false_positive_rate=rate,
        )

    @classmethod
    def identity(cls, block_length: int, threshold: float, tau: float = 0.96) -> Filter:
        """The filter that accepts, at the cut `tau`, exactly c_i >= `threshold`.

        z_i = 40 c_i + const, so a higher cut than `tau` asks for more confidence.
        Exact for float32 confidences if applied in float64.

        Raises:
            ValueError: `threshold` is not in [0.001, 1] or `tau` not in (0, 1).
        """
        if not 0.001 <= threshold <= 1.0 or not 0.0 < tau < 1.0:
            raise ValueError(
                f"threshold must be in [0.001, 1] and tau in (0, 1); got {threshold} "
                f"and {tau}"
            )
        slope = 40.0
        least = np.float32(threshold)
        # The cut on c lies halfway between `least` and the float32 below it. A quarter
        # of it goes into b1, where float32 is four times as fine as at the cut.
        middle = 0.5 * (float(least) + float(np.nextafter(least, np.float32(0.0))))
        cut = float(np.float32(tau))
        logit = math.log(cut) - math.log1p(-cut)
        b2 = float(np.float32(logit - 0.75 * slope * middle))
        b1 = (logit - b2) / slope - middle
        eye = torch.eye(block_length)
        return cls(
            eye,
            torch.full((block_length,), b1),
            slope * eye,
            torch.full((block_length,), b2),
            threshold=tau,
            source=f"none: the rule confidence >= {threshold}",
        )


load_filter = remembered(Filter.load)
"""`Filter.load`, which reads a file again only when it has changed: a server looks at
its filter for each request that names other parameters. The tensors are shared."""
