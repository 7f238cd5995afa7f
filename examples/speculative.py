# SPDX-License-Identifier: Apache-2.0
"""A diffusion model drafts for an autoregressive one; the texts stay the same.

The dict is what `vllm serve --speculative-config` takes. One of the requests asks for
no drafts: it is decoded token by token, in the same batch.
"""

from vllm import LLM, SamplingParams

QUESTIONS = ["Sort [Noah, Finn, Jack, Ben]", "Add 57+22", "Add 57+22"]

if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    llm = LLM(
        "llama-tiny",
        speculative_config={
            "method": "deer",
            "model": "deer-tiny",
            "num_speculative_tokens": 32,
        },
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
    )
    drafted = SamplingParams(temperature=0, max_tokens=40)
    plain = SamplingParams(
        temperature=0, max_tokens=40, extra_args={"dlm_draft_tokens": 0}
    )
    for result in llm.generate(QUESTIONS, [drafted, drafted, plain]):
        print(f"{result.prompt} -> {result.outputs[0].text}")
    counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    drafts, accepted = (
        counts[f"vllm:spec_decode_num_{what}"] for what in ("drafts", "accepted_tokens")
    )
    print(f"{drafts} drafts, {accepted} tokens of them accepted")
