# SPDX-License-Identifier: Apache-2.0
"""New weights for a running engine, from files: a backend of vLLM's weight transfer.

vLLM's own backends carry weights between GPUs. This one reads what a trainer has
written, on any device and in any number of processes:

    llm = LLM(model, weight_transfer_config={"backend": "dlm_safetensors"})
    llm.init_weight_transfer_engine({"init_info": {}})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": "new/model.safetensors"}})
    llm.finish_weight_update()
    llm.reset_prefix_cache()

A server with `--weight-transfer-config '{"backend": "dlm_safetensors"}'` has the same
calls as routes, where vLLM offers these (`VLLM_SERVER_DEV_MODE=1`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

BACKEND = "dlm_safetensors"


@dataclass
class FileInit(WeightTransferInitInfo):
    """Nothing has to be agreed upon."""


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """Where new weights are.

    Args:
        path: a file of safetensors, or a folder with some, that every worker can read.
            Their names are those of the model's checkpoints.

    Raises:
        ValueError: there is none.
    """

    path: str

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError(
                f"update_info: path: {self.path!r} is neither a file of safetensors "
                "nor a folder with some"
            )

    @property
    def files(self) -> list[Path]:
        path = Path(self.path)
        if path.is_dir():
            return sorted(path.glob("*.safetensors"))
        return [path] if path.is_file() and path.suffix == ".safetensors" else []


class FileWeightTransferEngine(WeightTransferEngine[FileInit, FileUpdate]):
    """Loads weights from files into the model where it lies; see the module."""

    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        """Nothing has to be set up."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: FileUpdate) -> None:
        self.model.load_weights(_tensors(update_info.files))

    def shutdown(self) -> None:
        """Nothing is held."""


def _tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no mapping
                yield name, tensors.get_tensor(name)
