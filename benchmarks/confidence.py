# SPDX-License-Identifier: Apache-2.0
"""Who says best which drafts to verify: SpecDec++'s head, or vLLM's own estimator.

vLLM's adaptive verification (CUDA only) drafts K tokens for every request and verifies
those that are most likely to be reached and accepted, over all requests. It ranks them
by products of a confidence in each draft. Here batches of beginnings of llama-tiny's
answers to held-out questions are drafted for by llama-tiny-draft, and ranked by

  fixed      nothing: as many drafts of each request
  estimator  vLLM's way: a logistic function of the most probable token's log-odds, one
             slope, an intercept for each position; fitted on half of the questions
  head       the acceptance head, one token late: a draft is judged by the tokens before
             it, since a draft that its own draw may drop would bias a sampled text
  head, own  the same on time: what it would be worth if texts were greedy only
  both       the estimator with the head, one late, as a second number to learn from
  perfect    what is accepted

Plain transformers, no engine: counts only, which do not depend on the machine.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.answers import MAX_TOKENS, TARGET
from benchmarks.ways_to_draft import DRAFT
from vllm_dlm.config.aliases import resolve
from vllm_dlm.spec_decode.specdec_pp.head import AcceptanceHead
from vllm_dlm.tasks.problems import sample_problems

MAX_LOG_ODDS = 10.0
REQUESTS = 32


@dataclass
class Drafts:
    """K drafts behind each of N states; all [N, K]."""

    accepted: torch.Tensor
    """Probability that the target accepts a draft, its predecessors being accepted."""
    log_odds: torch.Tensor
    """Of the draft model's most probable token."""
    head: torch.Tensor
    """Probability that the head gives a draft, read at that draft."""


@torch.no_grad()
def states_of(
    target: Any, tokenizer: Any, num_problems: int
) -> tuple[list[list[int]], int]:
    """Every beginning of llama-tiny's greedy answers to held-out questions.

    Returns:
        The states, and how many of them belong to the first half of the questions.
    """
    states: list[list[int]] = []
    num_first = 0
    for number, problem in enumerate(sample_problems(num_problems, 0, "heldout")):
        if number == num_problems // 2:
            num_first = len(states)
        ids = tokenizer(problem.question, return_tensors="pt").input_ids
        whole = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )[0].tolist()
        states += [whole[:end] for end in range(ids.shape[1], len(whole))]
    return states, num_first


@torch.no_grad()
def draft(
    target: Any,
    drafter: Any,
    head: AcceptanceHead,
    states: list[list[int]],
    most: int,
    temperature: float,
) -> Drafts:
    """Draft `most` tokens behind each state, and judge them."""
    # States end at the right edge, so that drafts are the last columns.
    longest = max(map(len, states))
    ids = torch.tensor([[0] * (longest - len(state)) + state for state in states])
    mask = torch.tensor(
        [[0] * (longest - len(state)) + [1] * (len(state) + most) for state in states]
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, given = None, ids
    for width in range(longest, longest + most):
        output = drafter(
            given,
            attention_mask=mask[:, :width],
            position_ids=positions[:, width - given.shape[1] : width],
            past_key_values=cache,
            use_cache=True,
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
        given = (
            (logits / temperature).softmax(-1).multinomial(1)
            if temperature
            else logits.argmax(-1, keepdim=True)
        )
        ids = torch.cat([ids, given], 1)
    place = {"attention_mask": mask, "position_ids": positions}
    hidden = drafter.base_model(ids, **place).last_hidden_state
    q = drafter.lm_head(hidden[:, -most - 1 : -1])
    p = target(ids, **place).logits[:, -most - 1 : -1]
    tokens = ids[:, -most:, None]
    if temperature:
        ratio = (p / temperature).softmax(-1) / (q / temperature).softmax(-1)
        accepted = ratio.gather(-1, tokens)[..., 0].clamp(max=1)
    else:
        accepted = (p.argmax(-1) == tokens[..., 0]).float()
    best = (q / (temperature or 1)).softmax(-1).amax(-1)
    return Drafts(
        accepted,
        best.logit().clamp(-MAX_LOG_ODDS, MAX_LOG_ODDS),
        head.accept_probability(hidden[:, -most:]).clone(),
    )


def estimated(features: torch.Tensor, drafts: Drafts, num_fitted: int) -> torch.Tensor:
    """Confidence [N, K] of a logistic function that is fitted on the first drafts.

    A draft counts as often as it is reached: nobody grades those behind a rejection.

    Args:
        features: [N, K, F], each with a slope; each position has an intercept.
    """
    accepted, given = drafts.accepted[:num_fitted], features[:num_fitted]
    reached = one_late(accepted).cumprod(-1)
    slopes = torch.zeros(features.shape[2], requires_grad=True)
    intercepts = torch.zeros(features.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [slopes, intercepts], max_iter=200, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            given @ slopes + intercepts, accepted, reduction="none"
        )
        total = (reached * each).sum() / reached.sum() + 1e-4 * slopes.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return torch.sigmoid(features @ slopes + intercepts).detach()


def one_late(confidence: torch.Tensor) -> torch.Tensor:
    """Each draft's predecessor's confidence [N, K]; the first draft has none."""
    return torch.cat([torch.ones_like(confidence[:, :1]), confidence[:, :-1]], 1)


def gained(accepted: torch.Tensor, confidence: torch.Tensor, per_request: int) -> float:
    """Accepted drafts per request where the batch verifies `per_request` on average."""
    survival = confidence.cumprod(-1)
    worth = accepted.cumprod(-1)
    total = 0.0
    for start in range(0, len(survival), REQUESTS):
        batch = slice(start, start + REQUESTS)
        flat, value = survival[batch].flatten(), worth[batch].flatten()
        # Ties go to the earlier positions, as products that only fall would have it.
        position = torch.arange(survival.shape[1]).repeat(len(flat) // len(survival[0]))
        order = (flat.double() - 1e-9 * position).argsort(descending=True)
        total += float(value[order[: per_request * len(survival[batch])]].sum())
    return total / len(survival)


def main() -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.confidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num-problems", type=int, default=200)
    parser.add_argument("--most", type=int, default=8, metavar="K")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    target, drafter = (
        AutoModelForCausalLM.from_pretrained(resolve(name), dtype=torch.float32).eval()
        for name in (TARGET, DRAFT)
    )
    tokenizer = AutoTokenizer.from_pretrained(resolve(TARGET))
    head = AcceptanceHead.load(resolve(DRAFT), drafter.config.hidden_size)
    states, num_fitted = states_of(target, tokenizer, args.num_problems)
    budgets = [n for n in (1, 2, 4, 6) if n < args.most]
    print(
        f"| temperature | ranked by | {' | '.join(f'{n} verified' for n in budgets)} |"
    )
    print("|--:|---|" + "--:|" * len(budgets))
    for temperature in (0.0, 1.0):
        drafts = draft(target, drafter, head, states, args.most, temperature)
        late = one_late(drafts.head)
        known = torch.stack([drafts.log_odds, late.logit(1e-4)], -1)
        ways = {
            "fixed": torch.ones_like(late),
            "estimator": estimated(known[..., :1], drafts, num_fitted),
            "head": late,
            "head, own": drafts.head,
            "both": estimated(known, drafts, num_fitted),
            "perfect": drafts.accepted,
        }
        # Requests of a batch are at different places of different answers.
        rest = num_fitted + torch.randperm(len(states) - num_fitted)
        for name, confidence in ways.items():
            accepted, judged = drafts.accepted[rest], confidence[rest]
            cells = [f"{gained(accepted, judged, n):.2f}" for n in budgets]
            print(f"| {temperature:g} | {name} | {' | '.join(cells)} |")
    print(f"\n{len(states) - num_fitted} states, {REQUESTS} at a time, K={args.most}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
