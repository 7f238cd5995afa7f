# SPDX-License-Identifier: Apache-2.0
"""Offline batch: requests with different decoding strategies share one batch."""

from vllm import SamplingParams

from vllm_dlm import LLM


def main() -> None:
    llm = LLM("llada-tiny", dlm_strategy="learn2pd")
    prompts = ["Reverse [Ada, Ben, Carl]", "Sort [Eva, Dan, Ada]", "Add 27+15"]
    sampling = [
        SamplingParams(temperature=0, max_tokens=64),
        SamplingParams(
            temperature=0,
            max_tokens=64,
            extra_args={"dlm": {"strategy": "threshold", "cache": "dual"}},
        ),
        SamplingParams(
            temperature=0,
            max_tokens=64,
            extra_args={"dlm_strategy": "factor", "dlm_factor": 1.5},
        ),
    ]
    for result in llm.generate(prompts, sampling):
        output = result.outputs[0]
        forwards = sum(output.spec_decode_metrics.histogram)
        print(f"{result.prompt} -> {output.text} ({forwards} forwards)")


if __name__ == "__main__":  # vLLM starts processes on a CPU
    main()
