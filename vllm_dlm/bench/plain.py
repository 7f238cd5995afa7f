# SPDX-License-Identifier: Apache-2.0
"""A plain PyTorch loop, as people run it today, one request (or batch) at a time.

Full attention (LLaDA, arXiv 2502.09992): blocks from left to right, cache `none`, or
`prefix` and `dual` as Fast-dLLM has them (arXiv 2505.22618). Block-causal (SDAR, arXiv
2510.06303): finished blocks keep their keys, and each takes a forward of its own to
write them. As in those loops, lm_head runs on every position of a forward and the
softmax is float64; in contrast to them, the mask id is banned, and a request ends with
the block that ends its text. It writes the same tokens as our engine: a test holds it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_dlm.bench.engine import Answer, Counts, Unsupported, Work
from vllm_dlm.bench.plain_model import KeysValues, PlainModel
from vllm_dlm.config.aliases import resolve

STRATEGIES = ("static", "threshold")
CACHES = ("none", "prefix", "dual")
FULL_BLOCK, SHORT_BLOCK = 32, 4
"""Block lengths of LLaDA and SDAR where neither the work nor the config has one."""


class PlainEngine:
    """The loop as an engine of the benchmark.

    Args:
        batch: requests decoded as one batch; their prompts must be equally long.
        softmax: dtype of the softmax, "float64" or "float32".
    """

    def __init__(self, batch: int = 1, softmax: str = "float64") -> None:
        self.batch = batch
        self.softmax: torch.dtype = getattr(torch, softmax)

    def start(self, model: str, options: Mapping[str, Any]) -> None:
        """Load the model; see `Engine.start`."""
        torch.set_num_threads(options["threads"])
        dtype: torch.dtype = getattr(torch, options["dtype"])
        self.model = PlainModel.load(resolve(model), dtype, options["max_length"])

    def generate(
        self, prompts: Sequence[Sequence[int]], work: Work, on_answer: Callable[[], Any]
    ) -> list[Answer]:
        """Answer all prompts; see `Engine.generate`. `work.concurrency` is not read."""
        loop = PlainLoop(self.model, work, self.softmax)
        answers = []
        for first in range(0, len(prompts), self.batch):
            group = prompts[first : first + self.batch]
            if len({len(prompt) for prompt in group}) > 1:
                raise Unsupported("a plain batch needs prompts of one length")
            answers += _answers(loop, torch.tensor([list(p) for p in group]))
            for _ in group:
                on_answer()
        return answers

    def start_counting(self) -> None:
        """Count from now on; see `Counting.start_counting`."""
        model = self.model
        model.rows = model.pairs = model.head_rows = model.forwards = 0

    def counts(self) -> Counts:
        """What was counted; see `Counting.counts`. No part of a step is timed."""
        model = self.model
        return Counts(model.forwards, model.rows, model.head_rows, model.pairs)

    def stop(self) -> None:
        """Let go of the model."""
        del self.model


@torch.inference_mode()
def _answers(loop: PlainLoop, prompts: Tensor) -> list[Answer]:
    work, model = loop.work, loop.model
    started, forwards, before = time.perf_counter(), model.forwards, prompts.shape[1]
    eos = None if work.ignore_eos else model.eos_id
    ends: list[tuple[float, int]] = []
    # As if each block were sent when it is done; the public loops send nothing.
    for end in loop.decode(prompts):
        ends.append((time.perf_counter() - started, end - before))
        if eos is not None and (loop.rows[:, before:end] == eos).any(1).all():
            break
    (first, first_tokens), (last, width) = ends[0], ends[-1]
    answers = []
    for row in loop.rows[:, before : before + min(width, work.max_tokens)].tolist():
        tokens = row[: row.index(eos) + 1] if eos in row else row
        answers.append(
            Answer(
                tokens=tokens,
                first=first,
                first_tokens=min(first_tokens, len(tokens)),
                last=last,
                forwards=model.forwards - forwards,
            )
        )
    return answers


class PlainLoop:
    """Decodes batches of prompts of one length.

    Raises:
        Unsupported: a strategy that it does not know, a cache that the model does not.
    """

    rows: Tensor
    """[R, P + canvas]: prompts, and what is written behind them so far."""
    wanted: int
    """One past the last position whose token is asked for."""

    def __init__(self, model: PlainModel, work: Work, softmax: torch.dtype) -> None:
        if work.strategy not in STRATEGIES:
            raise Unsupported(
                f"the plain loop has {' and '.join(STRATEGIES)}, not {work.strategy}"
            )
        others = set(work.strategy_config) - {"threshold"}
        if others or (work.strategy_config and work.strategy == "static"):
            raise Unsupported("of parameters, the plain loop has threshold's threshold")
        if work.cache not in CACHES:
            raise Unsupported(
                f"the plain loop has the caches {', '.join(CACHES)}, not {work.cache}"
            )
        if not model.is_llada and work.cache != "none":
            raise Unsupported(
                f"a block-causal model has no cache policy {work.cache}: it keeps the "
                "keys of finished blocks"
            )
        self.model, self.work, self.softmax = model, work, softmax
        if model.is_llada:
            self.length = work.block_length or FULL_BLOCK
        else:
            self.length = work.block_length or model.block_length or SHORT_BLOCK
        num_blocks = -(-work.max_tokens // self.length)
        # `threshold` follows no schedule: a step of its own writes one token at least.
        steps = (work.scheduled_steps or num_blocks * self.length) // num_blocks
        self.steps = min(max(steps, 1), self.length)

    def decode(self, prompts: Tensor) -> Iterator[int]:
        """Decode prompts [R, P] into `rows`.

        Yields:
            After each block, the position at which it ends.
        """
        if self.model.is_llada:
            return self._with_full_attention(prompts)
        return self._block_causal(prompts)

    def _with_full_attention(self, prompts: Tensor) -> Iterator[int]:
        before = prompts.shape[1]
        width = before + -(-self.work.max_tokens // self.length) * self.length
        rows = self._lay_out(prompts, width)
        cache = self.work.cache
        store = None if cache == "none" else self._store(rows)
        for start in range(before, width, self.length):
            end = start + self.length
            for step in range(self.length):
                if store is None or step == 0:
                    logits, low = self.model(rows, store=store), 0
                elif cache == "prefix":
                    logits, low = self.model(rows[:, start:], start, store), start
                else:
                    block = rows[:, start:end]
                    logits, low = self.model(block, start, store, width), start
                self._write(logits, low, start, step)
                if self._is_done(start):
                    break
            yield end

    def _block_causal(self, prompts: Tensor) -> Iterator[int]:
        before, length = prompts.shape[1], self.length
        width = -(-(before + self.work.max_tokens) // length) * length
        rows = self._lay_out(prompts, width)
        store = self._store(rows)
        first = before // length * length
        if first:
            blocks = torch.arange(first) // length
            mask = blocks[None] <= blocks[:, None]
            self.model(rows[:, :first], store=store, mask=mask)
        for start in range(first, width, length):
            block = rows[:, start : start + length]
            for step in range(length):
                self._write(self.model(block, start, store), start, start, step)
                if self._is_done(start):
                    break
            if start + length < width:
                # For the finished block's keys; its logits are thrown away.
                self.model(block, start, store)
            yield start + length

    def _lay_out(self, prompts: Tensor, width: int) -> Tensor:
        before = prompts.shape[1]
        self.wanted = before + self.work.max_tokens
        self.rows = torch.full((len(prompts), width), self.model.mask_id)
        self.rows[:, :before] = prompts
        return self.rows

    def _store(self, rows: Tensor) -> KeysValues:
        num_rows, length = rows.shape
        return KeysValues(
            self.model.shape, num_rows, length, self.model.lm_head.weight.dtype
        )

    def _is_done(self, start: int) -> bool:
        """Whether the block at `start` is written, as far as anybody wants it."""
        end = min(start + self.length, self.wanted)
        return not (self.rows[:, start:end] == self.model.mask_id).any()

    def _write(self, logits: Tensor, low: int, start: int, step: int) -> None:
        """Replace masks of the block at `start` by what a forward from `low` on says.

        Args:
            logits: [R, n, vocab], of positions from `low` on.
            step: of the block, from 0.
        """
        mask_id = self.model.mask_id
        logits[..., mask_id] = -torch.inf
        tokens = logits.argmax(-1)
        probabilities = logits.to(self.softmax).softmax(-1)
        confidence = probabilities.gather(-1, tokens[..., None])[..., 0]
        here = slice(start - low, start - low + self.length)
        tokens, confidence = tokens[:, here], confidence[:, here]
        block = self.rows[:, start : start + self.length]
        masked = block == mask_id
        confidence = confidence.masked_fill(~masked, -1.0)
        # LLaDA's even schedule: the first steps of a block take what is over.
        count, over = divmod(self.length, self.steps)
        scheduled = count + (step < over)
        if self.work.strategy == "threshold":
            chosen = confidence >= self.work.strategy_config.get("threshold", 0.9)
        else:
            chosen = torch.zeros_like(masked)
        chosen.scatter_(1, confidence.topk(scheduled, dim=1).indices, True)
        block.copy_(torch.where(chosen & masked, tokens, block))
