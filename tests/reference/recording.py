# SPDX-License-Identifier: Apache-2.0
"""Steps of a batch made by hand, for what records them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dlm.model_executor.slots import RequestSlots


class Batch:
    """Requests 0 to R - 1, each with a block of B positions; the first begins at 0."""

    def __init__(self, requests: int, width: int) -> None:
        self.plan: Any = SimpleNamespace(slots_np=np.arange(requests))
        self.slots = RequestSlots(requests, width, 0, torch.device("cpu"))
        self.host = self.slots.host
        self.host.block_length[:] = width
        self.config = SimpleNamespace(block_length=width, cache="none")
        for slot in range(requests):
            request: Any = SimpleNamespace(
                config=self.config,
                params=SimpleNamespace(temperature=0.0),
                layout=SimpleNamespace(canvas=None),
            )
            self.slots.requests[slot] = request

    def go_on(self, ended: bool | torch.Tensor = False) -> None:
        """What the sampler tells the host; where a block has ended the next begins."""
        begins = torch.from_numpy(self.host.block_start.copy())
        width = self.host.masked.shape[1]
        begins += width * torch.as_tensor(ended).long()
        masked = torch.ones(len(begins), width, dtype=torch.bool)
        slots = self.plan.slots_np
        self.host.send(
            slots, slots, torch.stack([begins, begins + width, begins * 0]), masked
        )
