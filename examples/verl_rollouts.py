# SPDX-License-Identifier: Apache-2.0
"""Roll-outs for a loop in the manner of verl, from a running server.

    vllm serve llada-tiny
    python examples/verl_rollouts.py http://localhost:8000/v1

verl runs an agent loop for each sample, many at a time: derive this class from its
`AgentLoopBase`, register it, and return an `AgentLoopOutput` of the same fields. The
loss is told in `extra_fields` which step wrote each token. Run as a script, the example
rolls out two groups, and weighs tokens as TraceRL does: each step of a sample alike.
"""

import asyncio
import sys
from collections import Counter

import openai

QUESTIONS = ["Insert Ada anywhere in [Ben, Carl]", "Shuffle [Ada, Ben, Carl]"]


class StepMapAgentLoop:
    """One sample: a chat in, token ids, log-probabilities and steps out."""

    def __init__(self, url):
        self.client = openai.AsyncOpenAI(base_url=url, api_key="none")

    async def run(self, sampling_params, raw_prompt):
        answer = await self.client.chat.completions.create(
            model="llada-tiny",
            messages=raw_prompt,
            **sampling_params,
            extra_body={
                "return_token_ids": True,
                "vllm_xargs": {"dlm_step_map": True, "dlm_strategy": "ass"},
            },
        )
        (choice,) = answer.choices
        return {
            "prompt_ids": answer.prompt_token_ids,
            "response_ids": choice.token_ids,
            "response_mask": [1] * len(choice.token_ids),
            "response_logprobs": choice.step_map["logprobs"],
            "extra_fields": {"steps": choice.step_map["steps"]},
        }


async def main(url):
    loop = StepMapAgentLoop(url)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS * 3]
    sampling = {"temperature": 1.0, "max_tokens": 16}
    for sample in await asyncio.gather(*[loop.run(sampling, chat) for chat in chats]):
        steps = sample["extra_fields"]["steps"]
        written = Counter(steps)
        weights = [1 / written[step] / len(written) for step in steps]
        total = sum(sample["response_logprobs"])
        print(f"{len(steps)} tokens, {len(written)} steps, {sum(weights):.3f}, {total}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
