# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one network, one on each GPU, started by torchrun.

Process r of N takes the rows r, r + N, r + 2 N, ... of a step. A step's loss is a sum
over its rows, so that gradients are summed, not averaged, and the loss is the same for
any N. What is trained decides how the weights lie:

    an adapter    every process has the whole network; the adapter's gradients are
                  summed once a step: data-parallel training (DDP). torch's own class
                  sums in the backward pass of one forward, and a recipe's step has
                  several of both.
    all weights   each process keeps a part of every weight, gradient and optimizer
                  state, and fetches a layer's weights when it computes it (FSDP2).

Checkpoints hold whole tensors, and are read by any number of processes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vllm_dlm.training.rows import take_rows

Example = TypeVar("Example")

_BUCKET = 1 << 25
"""Numbers that are summed in one exchange; 128 MiB in float32."""


@dataclass(frozen=True)
class Processes:
    """This process and those that train with it.

    Args:
        rank: Number of this one, from 0.
        size: How many there are.
        device: Of this one's part of the work.
    """

    rank: int
    size: int
    device: torch.device

    def share(self, example: Example) -> Example:
        """This process's rows of a dataclass of tensors."""
        if self.size == 1:
            return example
        return take_rows(example, slice(self.rank, None, self.size))

    def total(self, value: float) -> float:
        """The sum of all processes' values."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        return float(summed)

    def totals(self, values: Mapping[str, float]) -> dict[str, float]:
        """As `total`, of each value by its name."""
        return {name: self.total(value) for name, value in values.items()}

    def of_first(self, value: float) -> float:
        """The first process's value, such as its clock: what all decide by."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes, where FSDP2 has not yet done so.

        A parameter that this process's rows have not reached counts 0, in the order of
        `parameters`, which is the same everywhere.
        """
        if self.size == 1:
            return
        gradients = []
        for parameter in parameters:
            if not parameter.requires_grad or _is_shard(parameter):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([each.flatten() for each in bucket])
            dist.all_reduce(flat)
            parts = flat.split([each.numel() for each in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def alone(device: str | torch.device) -> Processes:
    """A run in one process."""
    return Processes(0, 1, torch.device(device))


def join(device: str) -> Processes:
    """Meet the processes that torchrun has started; alone without torchrun.

    Args:
        device: "cpu", or "cuda": of which each process takes one of its own.

    Raises:
        ValueError: a device by number, which would be all processes'; or there are
            fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return alone(device)
    place = torch.device(device)
    if place.index is not None:
        raise ValueError(
            f"with several processes the device is cpu or cuda, not {device!r}: each "
            "process takes a GPU of its own"
        )
    if place.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started over {local} processes here, and this machine has "
                f"{torch.cuda.device_count()} GPUs; expected at most as many"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        atexit.register(leave)
    return Processes(dist.get_rank(), dist.get_world_size(), place)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes files and talks: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def distribute(
    network: nn.Module, processes: Processes, compute_dtype: torch.dtype
) -> None:
    """Make a network, loaded on the CPU by each process, theirs together; in place.

    Args:
        network: If only a part of it is trained, such as an adapter, every process
            keeps the whole; else as of `shard`.
        compute_dtype: As of `shard`.
    """
    if processes.size == 1:
        return
    if all(parameter.requires_grad for parameter in network.parameters()):
        shard(network, processes, compute_dtype)
        return
    network.to(processes.device)
    for parameter in network.parameters():
        if parameter.requires_grad:
            dist.broadcast(parameter.data, 0)


def shard(network: nn.Module, processes: Processes, compute_dtype: torch.dtype) -> None:
    """Split a network's weights over the processes by FSDP2, in place.

    Afterwards its parameters are DTensors on `processes.device`. `hidden` and `head`
    work as before, if all processes call them equally often.

    Args:
        network: Its layers lie in a ModuleList named "blocks" or "layers"; on the CPU,
            whole, and equal in all processes.
        compute_dtype: Type that its layers compute in.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(processes.device.type, (processes.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
    )
    parts: list[Any] = [*layers_of(network), network]
    for part in parts:
        # Also what is outside of the layers: as long as it is whole, `parameters()`
        # gives tensors that no optimizer may keep.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        # Gloo has no sum with a factor.
        part.set_force_sum_reduction_for_comms(True)
    for method in ("hidden", "head"):
        register_fsdp_forward_method(network, method)
    network.to(processes.device)  # buffers; the weights are there


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a network, from the first on."""
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith(("blocks", "layers")):
            return list(module)
    raise ValueError("the network has no list of layers named blocks or layers")


# -- whole tensors ---------------------------------------------------------


def gather(state: Any) -> Any:
    """Nested dicts and lists with whole tensors for DTensors, those on the CPU.

    All processes have to call this with a state of the same form.
    """
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather(value) for value in state)
    return state.full_tensor().cpu() if _is_shard(state) else state


def gather_each(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As `gather`, one tensor at a time."""
    for name, tensor in tensors:
        yield name, gather(tensor)


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, laid out as another one is.

    Args:
        whole: Equal in all processes.
        like: A tensor of the same shape; where it is no DTensor, `whole` stays.
    """
    if not _is_shard(like):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    mesh = like.device_mesh
    # Everyone has the whole tensor: nothing is sent.
    return distribute_tensor(
        whole.to(mesh.device_type), mesh, like.placements, src_data_rank=None
    )


def scatter_weights(whole: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """The parts of a whole state dict that this process's network takes."""
    own = network.state_dict()
    return {name: scatter(tensor, own[name]) for name, tensor in whole.items()}


def scatter_optimizer(
    whole: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The parts of an optimizer's whole state dict that belong to its parameters."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]

    def part(value: Any, parameter: Tensor) -> Any:
        of_parameter = isinstance(value, Tensor) and value.shape == parameter.shape
        return scatter(value, parameter) if of_parameter else value

    states = {
        index: {name: part(value, parameters[index]) for name, value in state.items()}
        for index, state in whole["state"].items()
    }
    return {**whole, "state": states}


def _is_shard(value: Any) -> bool:
    if not isinstance(value, Tensor) or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type together, up to a size."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(each.numel() for each in bucket)
        if bucket and (
            tensor.dtype != bucket[0].dtype or size + tensor.numel() > _BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
