# SPDX-License-Identifier: Apache-2.0
"""What each of several processes does for `test_distributed`.

    torchrun ... two_processes.py FILE

FILE has, as JSON, commands of `vllm-dlm` with the status that each ends with, and
files, each with a command whose first step's loss and gradients go there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_dlm.cli.command import main, make_parser


def measure(command: list[str]) -> dict[str, Any]:
    """Loss and whole gradients of a command's first step, and whether it is sharded."""
    from torch.distributed.tensor import DTensor

    from vllm_dlm.training.distributed import gather
    from vllm_dlm.training.recipes import sft
    from vllm_dlm.training.recipes.command import _update, start

    training = start(sft.RECIPE, make_parser(command).parse_args(command))
    processes, network = training.processes, training.learner.network
    (measures,) = _update(sft.RECIPE, training, 0)
    processes.sum_gradients(network.parameters())
    trained = {
        name: parameter
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    return {
        "loss": processes.total(measures["loss"]),
        "gradients": {name: gather(each.grad) for name, each in trained.items()},
        "sharded": all(isinstance(each, DTensor) for each in trained.values()),
    }


def run(file: Path) -> None:
    """All that a file says."""
    from vllm_dlm.training.distributed import is_first

    todo = json.loads(file.read_text(encoding="utf-8"))
    for command, status in todo["commands"]:
        assert main(command) == status, command
    for goal, command in todo["measured"].items():
        found = measure(command)
        if is_first():
            torch.save(found, goal)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
