# SPDX-License-Identifier: Apache-2.0
"""vLLM's model classes, built as a worker builds them, without an engine."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def build():
    """`build(folder)`: the model that a worker would fill, and its checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    contexts = []

    def make(folder: Path, **options):
        options = {"dtype": "float32"} | options
        config = EngineArgs(
            model=str(folder), enforce_eager=True, **options
        ).create_engine_config()
        context = set_current_vllm_config(config)
        context.__enter__()
        contexts.append(context)
        if not torch.distributed.is_initialized():
            os.environ["VLLM_CPU_SIM_MULTI_NUMA"] = "0"
            init_distributed_environment(
                1, 0, f"tcp://127.0.0.1:{get_open_port()}", 0, backend="gloo"
            )
        destroy_model_parallel()
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
        return model

    yield make
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    destroy_model_parallel()
    destroy_distributed_environment()
