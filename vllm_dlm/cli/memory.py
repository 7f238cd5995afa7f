# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm models MODEL --memory`: what a model takes of a GPU, without its weights.

vLLM builds the model on torch's meta device, where a weight has a shape and no memory.
Weights are counted there, and keys by the layers' own specification, so both are what
the engine will allocate. What a forward takes besides is not counted.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GPU_GIGABYTES = (24, 80, 141)
"""Of 10^9 bytes: a little less than such GPUs have, so that what fits by this table
fits."""
NUM_GPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Needs:
    """What a model needs of a GPU's memory, in bytes, at tensor parallel size 1."""

    num_parameters: int
    weights: int
    kv_per_token: int
    """Keys and values of one position in all layers."""
    num_heads: int
    num_kv_heads: int
    dtype: str

    def num_requests(
        self, gigabytes: float, gpus: int, length: int, share: float
    ) -> int | None:
        """How many requests fit at most, beside the weights.

        Args:
            gigabytes: of each GPU, in 10^9 bytes.
            gpus: tensor parallel size: weights are divided by it, and so are keys as
                long as each GPU has another head.
            length: positions of a request, prompt and canvas.
            share: of the memory that vLLM may use.

        Returns:
            None where vLLM cannot divide the heads by so many GPUs.
        """
        divided = min(gpus, self.num_kv_heads)
        if self.num_heads % gpus or self.num_kv_heads % divided or gpus % divided:
            return None
        left = share * gigabytes * 1e9 - self.weights / gpus
        return max(int(left / (self.kv_per_token / divided * length)), 0)


def measure(model: str) -> Needs:
    """Build a model without memory and count.

    Args:
        model: a folder with a config.json; no weights and no tokenizer are read.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        model=model, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True
    )
    config = arguments.create_engine_config()
    model_config = config.model_config
    with set_current_vllm_config(config), _process_group():
        with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
            network = initialize_model(config)
        per_token = 0
        for layer in config.compilation_config.static_forward_context.values():
            get_spec = getattr(layer, "get_kv_cache_spec", None)
            if get_spec is not None and (spec := get_spec(config)) is not None:
                per_token += spec.page_size_bytes // spec.block_size
    weights = list(network.parameters())
    return Needs(
        num_parameters=sum(weight.numel() for weight in weights),
        weights=sum(weight.numel() * weight.element_size() for weight in weights),
        kv_per_token=per_token,
        num_heads=model_config.hf_text_config.num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        dtype=str(model_config.dtype).removeprefix("torch."),
    )


def measure_released(name: str) -> tuple[Needs, str]:
    """The same of a short name's model, which need not be on this machine.

    Returns:
        What it needs, and where its sizes stem from.
    """
    from vllm_dlm.config.aliases import ALIASES
    from vllm_dlm.config.released_shapes import released_config

    fields, source = released_config(name)
    with tempfile.TemporaryDirectory() as scratch:
        # The checkpoint's own name: some families are told apart by it.
        folder = Path(scratch) / ALIASES[name].target.rpartition("/")[2]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16"} | fields))
        return measure(str(folder)), source


@contextmanager
def _process_group() -> Iterator[None]:
    """vLLM's layers ask a process group for its size: one of this process alone."""
    import torch
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    if torch.distributed.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as scratch:
        init_distributed_environment(1, 0, f"file://{scratch}/meeting", 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


NOTE = """
GB are 10^9 bytes. 0: not even one. -: the heads cannot be divided by so many GPUs.
A request's tokens are its prompt and its canvas. Activations, logits and CUDA graphs
take their part as well."""


def report(needs: Needs, source: str, length: int) -> str:
    """The text that the command prints.

    Args:
        length: positions of a request.
    """
    share = usable_share()
    weights, request = needs.weights / 1e9, needs.kv_per_token * length / 1e9
    tokens = f"{needs.kv_per_token:,} bytes per token, {request:.2f} GB per request"
    lines = [
        f"sizes     {source}",
        f"weights   {weights:.2f} GB: {needs.num_parameters:,} weights, {needs.dtype}",
        f"KV cache  {tokens} of {length} tokens",
        f"\nRequests of {length} tokens that fit at most, if vLLM may use {share:.0%}:",
        " " * 10 + "".join(f"{count:>5} GPU" for count in NUM_GPUS),
    ]
    for gigabytes in GPU_GIGABYTES:
        counts = (needs.num_requests(gigabytes, n, length, share) for n in NUM_GPUS)
        cells = ("-" if count is None else str(count) for count in counts)
        lines.append(f"{gigabytes:>7} GB" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join([*lines, NOTE])


def usable_share() -> float:
    """vLLM's default of --gpu-memory-utilization."""
    from vllm.engine.arg_utils import EngineArgs

    return float(EngineArgs.gpu_memory_utilization)
