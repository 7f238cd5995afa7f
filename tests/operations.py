# SPDX-License-Identifier: Apache-2.0
"""Operations: what a piece of code asks of the device, counted by names."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None) -> Any:
        if not call.is_view:
            self.names.append(call.overloadpacket.__name__)
        return call(*args, **(kwargs or {}))
