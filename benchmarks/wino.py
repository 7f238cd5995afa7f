# SPDX-License-Identifier: Apache-2.0
"""WINO in plain PyTorch, on llada-tiny: why it is no strategy of the engine.

WINO (arXiv 2507.18578) has B shadow positions behind the canvas, masks that stand where
the active block stands. No other position sees them. A shadow sees everything but the
token at its own position: so it says how probable that token is, given all the others.
A step writes what is sure, and masks again what its shadow does not confirm.

    python -m benchmarks.wino --num-problems 60

`copies` gives each written token a copy of the canvas in which that token is masked:
what an engine without shadows could compute (`planning/branches.py`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dlm.config import aliases
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import sample_problems
from vllm_dlm.training.tiny.llada_modeling import LLaDAModel, load_llada

KINDS = ("threshold 0.9", "wino", "copies")
SURE, CONFIRMED = 0.6, 0.9
"""Thresholds of WINO: of what is written, and of what stays."""
FIRST_LIMIT = 30


@dataclass
class Count:
    """What the requests of one kind came to."""

    right: int = 0
    forwards: int = 0
    rows: int = 0


def revoke(
    confidence: torch.Tensor, confirmed: torch.Tensor, last_written: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of a block a step of WINO writes, and which it masks again.

    Args:
        confidence: [B]; at written positions -1.
        confirmed: [B]: what the shadows say of written tokens; above 1 at masks.
        last_written: how many tokens the last step has written.

    Returns:
        [B] bool each.
    """
    masks = int((confidence >= 0).sum())
    most = min(max(int(0.7 * masks), 5), 20)
    write = confidence > SURE
    if write.sum() > most:
        write = torch.zeros_like(write)
        write[confidence.topk(most).indices] = True
    elif not write.any():
        write[confidence.argmax()] = True
    if write.sum() <= 1:
        return write, torch.zeros_like(write)
    remask = confirmed < CONFIRMED
    if remask.sum() >= last_written:
        remask = torch.zeros_like(write)
        remask[confirmed.topk(last_written - 1, largest=False).indices] = True
    return write, remask


def probabilities(
    model: LLaDAModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    sees: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R, L, vocab] of ids [R, L] at positions [L]; `sees` [L, L] bool, or all."""
    transformer: Any = model.model["transformer"]
    hidden = transformer["wte"](ids)
    for block in transformer["blocks"]:
        hidden = block(hidden, model.cos[positions], model.sin[positions], sees)
    logits = model.head(hidden)
    logits[..., tokenizer.MASK_ID] = -torch.inf
    return logits.softmax(-1)


def shadowed(
    model: LLaDAModel, row: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, vocab] each: what the block's positions say, and what its shadows say."""
    length, width = len(row), end - start
    ids = torch.cat([row, torch.full((width,), tokenizer.MASK_ID)])
    positions = torch.cat([torch.arange(length), torch.arange(start, end)])
    sees = torch.ones(length + width, length + width, dtype=torch.bool)
    sees[:length, length:] = False
    sees[length:, start:end] = ~torch.eye(width, dtype=torch.bool)
    (both,) = probabilities(model, ids[None], positions, sees)
    return both[start:end], both[length:]


def copied(
    model: LLaDAModel,
    row: torch.Tensor,
    start: int,
    end: int,
    written: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `shadowed`, by a copy of the canvas for each of some written tokens.

    Args:
        written: [n] int64: their places in the block.
    """
    canvases = row.repeat(1 + len(written), 1)
    canvases[1 + torch.arange(len(written)), start + written] = tokenizer.MASK_ID
    of_all = probabilities(model, canvases, torch.arange(len(row)))[:, start:end]
    shadows = torch.zeros_like(of_all[0])
    shadows[written] = of_all[1 + torch.arange(len(written)), written]
    return of_all[0], shadows


@torch.inference_mode()
def decode(
    model: LLaDAModel, kind: str, prompt: list[int], canvas: int, block: int
) -> tuple[list[int], Count]:
    """Decode one request; the tokens of its canvas, and what they cost."""
    row = torch.full((len(prompt) + canvas,), tokenizer.MASK_ID)
    row[: len(prompt)] = torch.tensor(prompt)
    count = Count()
    for start in range(len(prompt), len(row), block):
        end, last_written = start + block, FIRST_LIMIT
        while (masked := row[start:end] == tokenizer.MASK_ID).any():
            count.forwards += 1
            if kind == "wino":
                said, shadows = shadowed(model, row, start, end)
                count.rows += len(row) + block
            else:
                checks = kind == "copies"
                written = (~masked).nonzero()[:, 0] if checks else masked.new_empty(0)
                said, shadows = copied(model, row, start, end, written.long())
                count.rows += (1 + len(written)) * len(row)
            best, tokens = said.max(-1)
            confidence = torch.where(masked, best, -1.0)
            own = shadows.gather(1, row[start:end, None])[:, 0]
            write, remask = revoke(
                confidence, torch.where(masked, 2.0, own), last_written
            )
            if kind.startswith("threshold"):
                write = (confidence >= 0.9) | (confidence == confidence.max())
                remask = torch.zeros_like(write)
            row[start:end] = torch.where(write, tokens, row[start:end])
            row[start:end] = torch.where(remask, tokenizer.MASK_ID, row[start:end])
            last_written = int(write.sum())
        if (row[start:end] == tokenizer.EOS_ID).any():
            break
    return row[len(prompt) :].tolist(), count


def main() -> int:
    """Decode problems by each kind, and print what they came to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-problems", type=int, default=60)
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--block-length", type=int, default=32)
    args = parser.parse_args()
    model = load_llada(aliases.resolve("llada-tiny"))
    free = ["shuffle", "insert_any", "replace_any"]
    print("| problems | rule | accuracy | forwards per request | rows per request |")
    print("|---|---|--:|--:|--:|")
    for name, tasks in (("all", None), ("with several right answers", free)):
        problems = sample_problems(args.num_problems, 0, "heldout", tasks)
        for kind in KINDS:
            total = Count()
            for problem in problems:
                prompt = tokenizer.encode_prompt(problem.question, chat=False)
                answer, count = decode(
                    model, kind, prompt, args.canvas, args.block_length
                )
                total.right += problem.check(tokenizer.decode(answer))
                total.forwards += count.forwards
                total.rows += count.rows
            share = [value / len(problems) for value in vars(total).values()]
            right, forwards, rows = share
            print(f"| {name} | {kind} | {right:.1%} | {forwards:.2f} | {rows:,.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
