# SPDX-License-Identifier: Apache-2.0
"""How far a training run has come: the checkpoint that it resumes from."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from pydantic import BaseModel, Field

from vllm_dlm.files.tensor_files import (
    Rule,
    check_tensors,
    read_checkpoint,
    write_checkpoint,
)
from vllm_dlm.files.whole_files import BadFile, checked
from vllm_dlm.training.distributed import scatter_optimizer, scatter_weights

CHECKPOINT = "training.pt"
"""Name of the checkpoint in the folder of the model that is trained."""

_WHAT = "training checkpoint"
_MOST_BYTES = 1 << 40


class Progress(BaseModel):
    """What the file holds."""

    model: dict[str, Any]
    """State dict, of what is trained: of an adapter, not of what it adapts. Whole
    tensors, however many processes train."""
    optimizers: list[dict[str, Any]]
    """State dicts."""
    step: int = Field(ge=0)
    """Steps that are done."""
    seconds: float = Field(ge=0, allow_inf_nan=False)
    """Seconds that these steps took, over all runs."""
    seed: int

    def restore(
        self,
        path: str | PathLike[str],
        network: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        """Put a run into this state, however many processes it has.

        Args:
            path: where this was read, for error messages.

        Raises:
            ValueError: it is of another network, or not all of it is finite.
        """
        rules = {
            name: Rule(" ".join(map(str, tensor.shape)))
            for name, tensor in trained_state(network).items()
        }
        check_tensors(self.model, rules, path, _WHAT)
        try:
            own = scatter_weights(self.model, network)
            network.load_state_dict(own, strict=False)
            for optimizer, saved in zip(optimizers, self.optimizers, strict=True):
                optimizer.load_state_dict(scatter_optimizer(saved, optimizer))
        except (ValueError, LookupError, RuntimeError, TypeError) as error:
            raise BadFile(_WHAT, path, error) from None
        states = [each.state for each in optimizers]
        for name, value in _tensors(states, "optimizers"):
            if value.is_floating_point() and not value.isfinite().all():
                raise BadFile(_WHAT, path, f"{name}: it holds NaN or infinite values")


def trained_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the parameters that need gradients."""
    trained = {name for name, each in network.named_parameters() if each.requires_grad}
    state = network.state_dict()
    return {name: tensor for name, tensor in state.items() if name in trained}


def read_progress(path: str | PathLike[str]) -> Progress:
    """Read a checkpoint, onto the CPU.

    Raises:
        ValueError: there is none, or it is no checkpoint of a training run.
    """
    state = read_checkpoint(path, _WHAT, _MOST_BYTES)
    try:
        return checked(Progress, state)
    except ValueError as error:
        raise BadFile(_WHAT, path, error) from None


def write_progress(path: str | PathLike[str], progress: Progress) -> None:
    """Write a checkpoint; a reader sees the old one or the new one, never half."""
    write_checkpoint(path, dict(progress))


def _tensors(value: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    """All tensors in nested dicts and lists, each with a name."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if not isinstance(value, dict | list | tuple):
        return []
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return [found for key, part in parts for found in _tensors(part, f"{name}.{key}")]
