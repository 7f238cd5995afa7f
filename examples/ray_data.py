# SPDX-License-Identifier: Apache-2.0
"""A data set through several engines, row by row: batch inference with Ray Data.

python examples/ray_data.py [model] [engines]

Every engine has a GPU of its own, and every row its strategy. Replace `from_items` by
`ray.data.read_parquet` and `take_all` by `write_parquet` for data that is no toy. It
runs without a GPU as well: see docs/scaling.md, also for clusters.
"""

import sys

import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

from vllm_dlm.config.aliases import resolve
from vllm_dlm.ray_cluster import connect


def main(model: str = "llada-tiny", engines: str = "2") -> None:
    connect(devices=int(engines))
    config = vLLMEngineProcessorConfig(
        model_source=resolve(model),
        # Starts sooner; without it, a GPU decodes faster.
        engine_kwargs={"enforce_eager": True},
        concurrency=(int(engines), int(engines)),
        batch_size=2,
        # Prompts are text and stay so: the engine alone is a stage.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(config, preprocess=request)
    questions = ["Reverse [Ada, Ben, Carl]", "Sort [Eva, Dan, Ada]", "Add 27+15"] * 2
    rows = [{"question": question, "strategy": "entropy"} for question in questions]
    rows += [row | {"strategy": "threshold"} for row in rows]
    for row in processor(ray.data.from_items(rows)).take_all():
        print(f"{row['strategy']}: {row['question']} -> {row['generated_text']}")
    print(f"{len(rows)} rows with {engines} engines of {model}")


def request(row: dict) -> dict:
    sampling = {"temperature": 0, "max_tokens": 64}
    options = {"dlm_strategy": row["strategy"]}
    return row | {
        "prompt": row["question"],
        "sampling_params": sampling | {"extra_args": options},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
