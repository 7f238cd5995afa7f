# SPDX-License-Identifier: Apache-2.0
"""SpecDec++: a head on the draft model says when a rejection has become probable.

The draft model writes one token per step. In the step that reads a drafted token, the
head turns the last hidden state at that token into the probability that the target
accepts it. Drafting stops once 1 - (their product) exceeds a threshold.
The rule runs one token late: the token that a step draws is submitted whatever the head
said of the tokens before it, so no draw decides whether it is itself submitted, and
verification with the draft's probabilities stays lossless.
Source: arXiv 2405.19715.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_dlm.files.tensor_files import (
    Rule,
    check_tensors,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)
from vllm_dlm.files.whole_files import MIB, BadFile

HEAD_FILE = "specdec/specdec_head.safetensors"
"""Path in a model's folder; beside the weights, vLLM would load the file with them."""

TRAIN_COMMAND = "vllm-dlm train specdec-head"

_ACCEPT = 1
_OUTPUT = "output."
_WHAT = "acceptance head"
_MOST_BYTES = 8192 * MIB
_MOST_BLOCKS = 64
"""Most residual blocks that a file may hold; the paper's heads have 3."""


class AcceptanceHead(nn.Module):
    """Blocks x + SiLU(Linear(x)), then two logits: reject, accept.

    Args:
        hidden_size: H, width of the draft model's last hidden state.
        num_blocks: how many blocks; 0 leaves a linear classifier.
        shared: all blocks are one, applied several times, as in the paper's repository.
            A file holds a copy for each, and is read as a head of separate blocks.

    Raises:
        ValueError: a size that is not positive, or a negative number of blocks.
    """

    def __init__(
        self, hidden_size: int, num_blocks: int = 3, shared: bool = False
    ) -> None:
        if hidden_size < 1 or num_blocks < 0:
            raise ValueError(
                "an acceptance head needs hidden_size >= 1 and num_blocks >= 0; got "
                f"{hidden_size} and {num_blocks}"
            )
        super().__init__()
        self.hidden_size = hidden_size
        blocks = [
            nn.Linear(hidden_size, hidden_size)
            for _ in range(min(num_blocks, 1) if shared else num_blocks)
        ]
        self.blocks = nn.ModuleList(blocks * num_blocks if shared else blocks)
        self.output = nn.Linear(hidden_size, 2)
        self.about: dict[str, str] = {}
        """What its file says of its training (`save`)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., 2] (reject, accept) of hidden states [..., H]."""
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        return self.output(hidden)

    @torch.inference_mode()
    def accept_probability(self, hidden: torch.Tensor) -> torch.Tensor:
        """Probability [...] in float32 that the tokens read at `hidden` [..., H] pass.

        The state at a token judges that token, not the one drawn from it.
        """
        logits = self(hidden.to(self.output.weight.dtype)).float()
        return logits.softmax(-1)[..., _ACCEPT]

    def save(self, folder: str | Path, about: Mapping[str, str] | None = None) -> Path:
        """Write `HEAD_FILE` below `folder` (a model's, or any other), in float32.

        Args:
            folder: made if it is missing.
            about: what the head was trained on, in words, by name; kept in the file.

        Returns:
            The file. A reader sees the old one or the new one, never half.
        """
        path = Path(folder) / HEAD_FILE
        weights = {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in self.state_dict().items()
        }
        write_safetensors(path, weights, {**self.about, **(about or {})})
        return path

    @classmethod
    def load(cls, path: str | Path, hidden_size: int | None = None) -> AcceptanceHead:
        """Read a head onto the CPU, in float32.

        Args:
            path: a folder that holds `HEAD_FILE`, or a file: one of ours, or the
                model.safetensors or pytorch_model.bin of a head that the paper's
                repository trained. Its blocks are one module applied several times.
            hidden_size: width that the draft model needs; None takes any.

        Raises:
            ValueError: no such file, not a head, or a head of another width.
        """
        path = Path(path)
        if path.is_dir():
            path = path / HEAD_FILE
        if not path.exists():
            raise ValueError(
                f"SpecDec++ needs an acceptance head, and there is no file {path}. "
                f'Train one for this draft model with `{TRAIN_COMMAND}`, or set "head" '
                "to the file or folder of one"
            )
        try:
            weights, about = _read(path)
            weights = _without_ties(weights)
            num_blocks = len(weights) // 2 - 1
            sizes = check_tensors(weights, _rules(num_blocks), path, _WHAT)
            head = cls(sizes["H"], num_blocks)
            head.load_state_dict(weights)
        except (ValueError, RuntimeError) as error:
            reason = error.reason if isinstance(error, BadFile) else error
            raise ValueError(f"{path} is not an acceptance head: {reason}") from None
        if hidden_size is not None and head.hidden_size != hidden_size:
            raise ValueError(
                f"the acceptance head {path} reads hidden states of width "
                f"{head.hidden_size}, the draft model's have width {hidden_size}. A "
                f"head fits the draft model it was trained on: `{TRAIN_COMMAND}`"
            )
        head.about = about
        return head.requires_grad_(False).eval()


@dataclass(frozen=True)
class StopRule:
    """When the rows of a batch stop drafting.

    Args:
        threshold: most probable rejection of any token read so far, in (0, 1).
        min_tokens: drafts before the head may stop a row.
        max_tokens: drafts after which a row always stops.

    Raises:
        ValueError: a value out of its range, or min_tokens > max_tokens.
    """

    threshold: float = 0.7
    min_tokens: int = 2
    max_tokens: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(
                f"stop_threshold must be between 0 and 1; got {self.threshold}"
            )
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                "min_tokens must be from 1 to num_speculative_tokens "
                f"({self.max_tokens}); got {self.min_tokens}"
            )

    def goes_on(
        self, accepted: torch.Tensor, drafted: int, limits: torch.Tensor
    ) -> torch.Tensor:
        """Which rows draft one more token.

        Args:
            accepted: [N] float32, the product of `accept_probability` over the drafts
                that were read: all but the newest. 1 if there is one draft.
            drafted: tokens that each of these rows has drafted.
            limits: [N] integer, most drafts of the row.

        Returns:
            [N] bool.
        """
        confident = 1.0 - accepted <= self.threshold
        room = drafted < limits.clamp(max=self.max_tokens)
        return room & (confident | (drafted < self.min_tokens))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file or of a torch checkpoint."""
    if path.suffix == ".safetensors":
        return read_safetensors(path, _WHAT, _MOST_BYTES)
    weights = read_checkpoint(path, _WHAT, _MOST_BYTES)
    if not isinstance(weights, Mapping) or not all(isinstance(k, str) for k in weights):
        kind = type(weights).__name__
        raise ValueError(f"expected tensors by name, got {kind}")
    return dict(weights), {}


def _rules(num_blocks: int) -> dict[str, Rule]:
    """What the tensors of a head with so many blocks are."""
    if num_blocks > _MOST_BLOCKS:
        raise ValueError(f"it has over {_MOST_BLOCKS} blocks")
    rules = {_OUTPUT + "weight": Rule("2 H"), _OUTPUT + "bias": Rule("2")}
    for i in range(num_blocks):
        rules |= {f"blocks.{i}.weight": Rule("H H"), f"blocks.{i}.bias": Rule("H")}
    return rules


def _without_ties(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights under our names, from ours or from the repository's.

    There a head is one `nn.Sequential`: block i is `model.{i}.linear`, the last entry
    the output. All blocks are one module, of which safetensors keeps a single copy: a
    block that is not in the file is the one that is.
    """
    if _OUTPUT + "weight" in weights:
        return weights
    numbers = [
        match[1]
        for name in weights
        if (match := re.fullmatch(r"model\.(\d+)\.weight", name))
    ]
    if not numbers:
        names = ", ".join(sorted(weights)[:8]) or "none"
        raise ValueError(f"it has neither output.weight nor model.N.weight: {names}")
    # Not as a number yet: it may have any number of digits.
    if len(numbers[0]) > 2 or int(numbers[0]) > _MOST_BLOCKS:
        raise ValueError(
            f"model.{numbers[0][:20]}.weight: a head has at most {_MOST_BLOCKS} blocks"
        )
    count = int(numbers[0])
    found: dict[str, Any] = {}
    for kind in ("weight", "bias"):
        blocks = [weights.get(f"model.{i}.linear.{kind}") for i in range(count)]
        kept = next((block for block in blocks if block is not None), None)
        for i, block in enumerate(blocks):
            if kept is None:
                raise ValueError(f"it has no model.{i}.linear.{kind}")
            found[f"blocks.{i}.{kind}"] = kept if block is None else block
        found[_OUTPUT + kind] = weights.get(f"model.{numbers[0]}.{kind}")
    return found
