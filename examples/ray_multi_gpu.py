# SPDX-License-Identifier: Apache-2.0
"""One model on several GPUs of a Ray cluster: tensor parallel.

python examples/ray_multi_gpu.py [model] [GPUs]

Every GPU holds a part of each weight matrix, and all work on every forward. Without a
cluster (see docs/scaling.md) it starts one on this machine. A CPU build of vLLM runs
the same, with workers in place of GPUs.
"""

import sys

from vllm import SamplingParams

from vllm_dlm import LLM
from vllm_dlm.ray_cluster import connect


def main(model: str = "llada-tiny", gpus: str = "2") -> None:
    connect(devices=int(gpus))
    llm = LLM(
        model,
        dlm_strategy="threshold",
        tensor_parallel_size=int(gpus),
        distributed_executor_backend="ray",
        enforce_eager=True,  # starts sooner; without it, a GPU decodes faster
    )
    prompts = ["Reverse [Ada, Ben, Carl]", "Sort [Eva, Dan, Ada]", "Add 27+15"]
    for result in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64)):
        print(f"{result.prompt} -> {result.outputs[0].text}")
    print(f"{len(prompts)} answers of {model} on {gpus} workers")


if __name__ == "__main__":  # vLLM starts processes
    main(*sys.argv[1:])
