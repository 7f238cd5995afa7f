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
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

HEAD_FILE = "specdec/specdec_head.safetensors"
"""In a model's folder; not beside its weights, where vLLM loads every such file."""

TRAIN_COMMAND = "vllm-dlm train specdec-head"

_ACCEPT = 1
_OUTPUT = "output."
_UNREADABLE = (OSError, SafetensorError, UnpicklingError)


class AcceptanceHead(nn.Module):
    """Blocks x + SiLU(Linear(x)), then two logits: reject, accept.

    Args:
        hidden_size: H, width of the draft model's last hidden state.
        num_blocks: how many blocks; 0 leaves a linear classifier.

    Raises:
        ValueError: a size that is not positive, or a negative number of blocks.
    """

    def __init__(self, hidden_size: int, num_blocks: int = 3) -> None:
        if hidden_size < 1 or num_blocks < 0:
            raise ValueError(
                "an acceptance head needs hidden_size >= 1 and num_blocks >= 0; got "
                f"{hidden_size} and {num_blocks}"
            )
        super().__init__()
        self.hidden_size = hidden_size
        self.blocks = nn.ModuleList(
            nn.Linear(hidden_size, hidden_size) for _ in range(num_blocks)
        )
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
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {
            name: value.detach().to("cpu", torch.float32).contiguous()
            for name, value in self.state_dict().items()
        }
        part = path.with_name(path.name + ".part")
        save_file(weights, part, metadata={**self.about, **(about or {})})
        part.chmod(0o644)  # safetensors leaves it readable by its owner only
        part.replace(path)
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
        if not path.is_file():
            raise ValueError(
                f"SpecDec++ needs an acceptance head, and there is no file {path}. "
                f'Train one for this draft model with `{TRAIN_COMMAND}`, or set "head" '
                "to the file or folder of one"
            )
        try:
            weights, about = _read(path)
            weights = _without_ties(weights)
            head = cls(
                weights[_OUTPUT + "weight"].shape[1],
                sum(name.endswith(".weight") for name in weights) - 1,
            )
            head.load_state_dict(weights)
        except (*_UNREADABLE, LookupError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not an acceptance head: {error}") from error
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


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file or of a torch checkpoint."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in sorted(file.keys())}
            return weights, dict(file.metadata() or {})
    return torch.load(path, map_location="cpu", weights_only=True), {}


def _without_ties(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under our names, from ours or from the repository's.

    There a head is one `nn.Sequential`: block i is `model.{i}.linear`, the last entry
    the output. All blocks are one module, of which safetensors keeps a single copy: a
    block that is not in the file is the one that is.
    """
    if _OUTPUT + "weight" in weights:
        return weights
    names = " ".join(sorted(weights))
    output = re.search(r"\bmodel\.(\d+)\.weight", names)
    if output is None:
        raise ValueError(f"it has neither output.weight nor model.N.weight: {names}")
    count = int(output[1])
    found: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        blocks = [weights.get(f"model.{i}.linear.{kind}") for i in range(count)]
        kept = next((block for block in blocks if block is not None), None)
        for i, block in enumerate(blocks):
            if kept is None:
                raise ValueError(f"it has no model.{i}.linear.{kind}")
            found[f"blocks.{i}.{kind}"] = kept if block is None else block
        found[_OUTPUT + kind] = weights[f"model.{count}.{kind}"]
    return found
