# SPDX-License-Identifier: Apache-2.0
"""What steering by a base is worth: held-out questions of the built-in tasks, greedy.

Three pairs: llama-tiny with llama-tiny-draft as its base, the other way round, and, as
in the paper, a model and what it becomes by a short tuning: llama-tiny-draft, trained
further here on the built-in tasks. For each pair the constant is calibrated on training
questions. Texts are written by a plain loop over both models with the engine's own
formula; that an engine writes the same, `tests/steering` shows.

    python -m benchmarks.steering
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch

from vllm_dlm.cli.arguments import count
from vllm_dlm.steering.options import KEEP
from vllm_dlm.steering.rule import steer
from vllm_dlm.tasks.evaluation import exact_match
from vllm_dlm.tasks.tokenizer import EOS_ID
from vllm_dlm.training.drafters.teacher import load_causal_lm, pad_right
from vllm_dlm.training.loop import LoopOptions, prepare
from vllm_dlm.training.rows import Row, task_rows
from vllm_dlm.training.steer_mu import calibrate

MOST_TOKENS = 48
TUNING_ROWS = 32
LEARNING_RATE = 1e-3


def tune(model: Any, steps: int, seed: int) -> Any:
    """A copy of a model, trained on the answers of the built-in tasks."""
    tuned = copy.deepcopy(model).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=LEARNING_RATE)
    rows = task_rows(steps * TUNING_ROWS, seed)
    for step in range(steps):
        part = rows[step * TUNING_ROWS : (step + 1) * TUNING_ROWS]
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / steps)
        loss = answer_loss(tuned, part)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tuned.requires_grad_(False).eval()


def answer_loss(model: Any, rows: list[Row]) -> torch.Tensor:
    """Mean cross-entropy of the rows' answers."""
    ids, valid = pad_right([row.prompt_ids + row.response_ids for row in rows])
    starts = torch.tensor([len(row.prompt_ids) for row in rows])
    answers = (torch.arange(1, ids.shape[1]) >= starts[:, None]) & valid[:, 1:]
    logits = model(input_ids=ids, attention_mask=valid.long()).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[answers], ids[:, 1:][answers])


@torch.inference_mode()
def write(
    models: tuple[Any, Any], prompts: list[list[int]], mu: float, keep: float
) -> list[list[int]]:
    """Greedy answers of a steered pair, without their end token."""
    texts = [list(prompt) for prompt in prompts]
    live = list(range(len(texts)))
    for _ in range(MOST_TOKENS):
        ids, valid = pad_right([texts[index] for index in live])
        last = valid.sum(1) - 1
        logits = [
            model(input_ids=ids, attention_mask=valid.long()).logits[
                torch.arange(len(live)), last
            ]
            for model in models
        ]
        best = steer(logits[0], logits[1], mu, keep).argmax(-1).tolist()
        for index, token in zip(live, best, strict=True):
            texts[index].append(token)
        live = [index for index in live if texts[index][-1] != EOS_ID]
        if not live:
            break
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [[token for token in answer if token != EOS_ID] for answer in answers]


def main() -> None:
    """Print a table of pairs and constants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-problems", type=count, default=400)
    parser.add_argument("--num-rows", type=count, default=400, help="to calibrate")
    parser.add_argument(
        "--steps", type=count, nargs="+", default=[100], help="of tunings"
    )
    parser.add_argument("--keep", type=float, default=KEEP)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=count)
    args = parser.parse_args()
    prepare(LoopOptions(steps=1, seed=args.seed, threads=args.threads))
    large, small = load_causal_lm("llama-tiny"), load_causal_lm("llama-tiny-draft")
    pairs = {
        "llama-tiny, base llama-tiny-draft": (large, small),
        "llama-tiny-draft, base llama-tiny": (small, large),
    }
    for steps in args.steps:
        name = f"llama-tiny-draft tuned for {steps} steps, base llama-tiny-draft"
        pairs[name] = (tune(small, steps, args.seed), small)
    # Rows that no tuning has seen.
    rows = task_rows(args.num_rows, args.seed + 1)
    print("| pair | mu | from | loss | right |\n|---|--:|---|--:|--:|")
    for name, models in pairs.items():
        found = calibrate(*models, rows, keep=args.keep, batch_rows=64)
        mus = {"no steering": 0.0, "mean": found.mean, "likelihood": found.likelihood}
        for origin, mu in mus.items():
            right = exact_match(
                partial(write, models, mu=mu, keep=args.keep),
                args.num_problems,
                batch_size=250,
            )["all"]
            print(
                f"| {name} | {mu:.3g} | {origin} | {found.loss(mu):.4f} | "
                f"{100 * right:.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    main()
