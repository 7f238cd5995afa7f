# SPDX-License-Identifier: Apache-2.0
"""How a diffusion language model writes: the whole loop, in plain PyTorch.

python examples/plain_loop.py [strategy] [question]

An answer begins as a canvas, a row of masks. In each step the network proposes a token
for every mask, and a decoding strategy decides which proposals are written. Blocks of
the canvas are filled from left to right. To this loop, vLLM adds batches and memory.
"""

import sys

import torch

from vllm_dlm.config.aliases import resolve
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import Context, View, numeric_fields
from vllm_dlm.tasks.tokenizer import EOS_ID, MASK_ID, VOCABULARY, decode, encode_prompt
from vllm_dlm.training.tiny.llada_modeling import load_llada

CANVAS, BLOCK = 32, 8  # tokens; a served request has `max_tokens` and `block_length`
WORDS = {i: word for i, word in enumerate(VOCABULARY)} | {MASK_ID: "·", EOS_ID: "∎"}


@torch.inference_mode()
def main(name="threshold", question="Shuffle [Ada, Ben, Carl, Dora, Emil]") -> None:
    network, rule = load_llada(resolve("llada-tiny")), STRATEGIES[name]
    strategy = rule(rule.Params(), BLOCK, Context(torch.device("cpu"), "llada-tiny"))
    simple = (strategy.logit_rows, strategy.scope) == ("masked", "block")
    if not simple or strategy.needs - {"entropy"}:
        sys.exit(f"{name} reads more than this loop has: try threshold, factor or eb")
    names = numeric_fields(rule.Params)  # a batch has one number for each request
    row_params = {n: torch.tensor([getattr(strategy.params, n)]) for n in names}
    ids = torch.tensor([encode_prompt(question, chat=False) + [MASK_ID] * CANVAS])
    canvas = ids[:, -CANVAS:]  # a slice shares memory: what is written here is in `ids`
    for start in range(0, CANVAS, BLOCK):
        block, state = canvas[:, start : start + BLOCK], {}
        for key, field in strategy.state.items():  # a memory that lasts for one block
            state[key] = torch.full((1, *field.shape), field.fill, dtype=field.dtype)
        for step in range(BLOCK):
            # Attention goes both ways: a new token may change every other proposal.
            logits = network(ids)[:, -CANVAS:][:, start : start + BLOCK]
            view = make_view(block, logits, start, step, state)
            decision = strategy.select(view, row_params)
            block.copy_(torch.where(decision.commit, view.candidate, block))
            state |= decision.state or {}
            print(f"step {step}:  ", *(WORDS[i] for i in canvas[0].tolist()), sep="")
            if MASK_ID not in block:
                break
        if EOS_ID in block:
            break  # the text ends here: nobody asks for the blocks behind it
    print(f"{question} -> {decode(canvas[0].tolist())}")


def make_view(block, logits, start: int, step: int, state: dict) -> View:
    """What a strategy sees: statistics of 1 request by BLOCK positions, no logits."""
    logits[..., MASK_ID] = -torch.inf  # a mask is never proposed
    probabilities, masked = logits.softmax(-1), block == MASK_ID
    confidence, candidate = probabilities.max(-1)
    return View(
        tokens=block,
        masked=masked,
        valid=torch.ones_like(masked),
        decided=~masked,
        positions=start + torch.arange(BLOCK)[None],
        candidate=torch.where(masked, candidate, block),
        confidence=confidence * masked,
        is_eos=candidate == EOS_ID,
        step=torch.tensor([step]),
        scheduled=torch.tensor([1]),  # one token per step, unless `steps` is set
        steps=torch.tensor([BLOCK]),
        progress=(start + (~masked).sum(1)) / CANVAS,
        state=state,
        entropy=torch.special.entr(probabilities).sum(-1) * masked,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
