# SPDX-License-Identifier: Apache-2.0
"""Roll-outs for a GRPO loop in the manner of TRL, from a running server.

    vllm serve llada-tiny
    python examples/trl_rollouts.py http://localhost:8000/v1

`GRPOTrainer(rollout_func=...)` takes a function like this one: lists, an entry for each
prompt. A diffusion model adds when each token was written (`steps`): by that a loss
knows what the model saw, which `states` shows. A server that gets new weights while it
runs is in docs/training.md. Run as a script, the example does a step of GRPO but its
backward pass.
"""

import statistics
import sys

import openai

from vllm_dlm.tasks.tokenizer import MASK_ID

GENERATIONS = 4
client = openai.OpenAI(base_url=sys.argv[1], api_key="none")


def rollout_func(prompts, trainer=None):
    """What TRL asks for: ids and log-probabilities; further lists go to rewards."""
    found = {name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "steps")}
    options = {"return_token_ids": True, "vllm_xargs": {"dlm_step_map": True}}
    answer = client.completions.create(
        model="llada-tiny",
        prompt=prompts,
        temperature=1.0,
        max_tokens=20,
        extra_body=options,
    )
    for choice in answer.choices:
        found["prompt_ids"].append(choice.prompt_token_ids)
        found["completion_ids"].append(choice.token_ids)
        found["logprobs"].append(choice.step_map["logprobs"])
        found["steps"].append(choice.step_map["steps"])
    return found


def states(ids, steps):
    """Each canvas on the way, and the positions that its step wrote."""
    for step in sorted(set(steps)):
        canvas = [t if s < step else MASK_ID for t, s in zip(ids, steps, strict=True)]
        yield canvas, [i for i, s in enumerate(steps) if s == step]


if __name__ == "__main__":
    rolled = rollout_func(["Insert Ada anywhere in [Ben, Carl]"] * GENERATIONS)
    rewards = [-len(ids) for ids in rolled["completion_ids"]]
    for row, ids in enumerate(rolled["completion_ids"]):
        advantage = rewards[row] - statistics.fmean(rewards)
        total = sum(rolled["logprobs"][row])
        states_of_row = list(states(ids, rolled["steps"][row]))
        written = [len(positions) for _, positions in states_of_row]
        print(f"advantage {advantage:+.2f}, log p {total:.3f}, tokens {written}")
