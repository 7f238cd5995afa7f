# SPDX-License-Identifier: Apache-2.0
"""Replay DEL on a model's greedy answers, without an engine: its rules, compared.

What each exit would draft is computed once, behind every token of every answer. Then
the rounds of any rule are counted in no time: the table has intervals (bootstrap over
the questions, each rule less the default one), and exits that are surer or less sure
than the model has them. Counts are those of an engine with one request at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch.nn import functional
from tqdm import tqdm

from benchmarks.answers import MAX_TOKENS, TARGET
from vllm_dlm.config.aliases import resolve
from vllm_dlm.spec_decode.del_exit.exits import (
    PROMPT_WINDOW,
    ExitStatistics,
    goes_on,
    top_token,
)
from vllm_dlm.spec_decode.options import Del
from vllm_dlm.tasks.problems import sample_problems
from vllm_dlm.tasks.tokenizer import encode_prompt

STOPS: tuple[str, ...] = get_args(Del.model_fields["stop"].annotation)
DEFAULTS = Del()
MOST = DEFAULTS.num_speculative_tokens
POWERS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Exits' probabilities are raised to these: below 1 an exit is surer than it was."""
RESAMPLINGS = 1000

Pages = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, [R, heads, n, d]."""


class Network:
    """A Llama of transformers, run layer by layer."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModelForCausalLM

        self.whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.layers = self.whole.model.layers
        ids = self.whole.config.eos_token_id
        self.ends = {ids} if isinstance(ids, int) else set(ids or ())

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        seen: torch.Tensor,
        pages: Pages | None,
        exit: int,
    ) -> tuple[list[torch.Tensor], Pages]:
        """Hidden states behind each of the first layers, and their keys and values.

        Args:
            tokens: [R, n].
            positions: [R, n].
            seen: [R, 1, n, keys] bool.
            pages: of the tokens before these, or None.
            exit: how many layers.
        """
        hidden = self.whole.model.embed_tokens(tokens)
        cos, sin = self.whole.model.rotary_emb(hidden, positions)
        states, written = [], []
        for number, layer in enumerate(self.layers[:exit]):
            read = layer.input_layernorm(hidden)
            shape = (*tokens.shape, -1, layer.self_attn.head_dim)
            query, key, value = (
                project(read).view(shape).transpose(1, 2)
                for project in (
                    layer.self_attn.q_proj,
                    layer.self_attn.k_proj,
                    layer.self_attn.v_proj,
                )
            )
            query, key = _turned(query, cos, sin), _turned(key, cos, sin)
            if pages is not None:
                key = torch.cat([pages[number][0], key], 2)
                value = torch.cat([pages[number][1], value], 2)
            written.append((key, value))
            mixed = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, enable_gqa=True
            )
            mixed = mixed.transpose(1, 2).flatten(2)
            hidden = hidden + layer.self_attn.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            states.append(hidden)
        return states, written

    def top(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best token and its probability, [N] each, of [N, H] hidden states."""
        return top_token(self.whole.lm_head(self.whole.model.norm(hidden)))


def _turned(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = rows.chunk(2, -1)
    return rows * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


@dataclass(frozen=True)
class Recording:
    """An answer, what every exit says at its positions, and what it would draft."""

    prompt: int
    """Tokens of the prompt."""
    tokens: list[int]
    """Prompt and answer."""
    hits: np.ndarray
    """[n, E] bool: the exit says what the model says."""
    sure: np.ndarray
    """[n, E]: the probability of what the exit says."""
    drafts: dict[tuple[int, int], tuple[list[int], list[float]]]
    """(tokens known, exit) -> up to `MOST` tokens behind them, and their
    probabilities; an end of the text is the last."""


@torch.no_grad()
def record(network: Network, prompt: Sequence[int], max_tokens: int) -> Recording:
    """Answer a prompt greedily, and let every exit draft behind every token."""
    layers = len(network.layers)
    tokens = network.whole.generate(
        torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=max_tokens
    )[0].tolist()
    count = len(tokens)
    states, pages = network.run(
        torch.tensor([tokens]),
        torch.arange(count)[None],
        torch.ones(count, count, dtype=torch.bool).tril()[None, None],
        None,
        layers,
    )
    said = [network.top(state[0]) for state in states]
    best, sure = (
        torch.stack(list(part), 1).numpy() for part in zip(*said, strict=True)
    )
    drafts: dict[tuple[int, int], tuple[list[int], list[float]]] = {}
    known = torch.arange(len(prompt) + 1, count)
    for exit in range(1, layers):
        found = _drafts(network, tokens, known, pages[:exit], exit)
        drafts |= {(int(n), exit): draft for n, draft in zip(known, found, strict=True)}
    return Recording(
        len(prompt), tokens, best[:, :-1] == best[:, -1:], sure[:, :-1], drafts
    )


def _drafts(
    network: Network, tokens: list[int], known: torch.Tensor, pages: Pages, exit: int
) -> list[tuple[list[int], list[float]]]:
    """What an exit drafts behind the first `known` [R] tokens of a text."""
    rows = len(known)
    drafts: list[tuple[list[int], list[float]]] = [([], []) for _ in range(rows)]
    if not rows:
        return drafts
    newest = torch.tensor(tokens)[known - 1]
    seen = torch.arange(len(tokens)) < known[:, None] - 1
    pages = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in pages]
    going = set(range(rows))
    for step in range(MOST):
        seen = torch.cat([seen, torch.ones(rows, 1, dtype=torch.bool)], 1)
        states, pages = network.run(
            newest[:, None], known[:, None] - 1 + step, seen[:, None, None], pages, exit
        )
        newest, sure = network.top(states[-1][:, 0])
        for row in sorted(going):
            drafts[row][0].append(int(newest[row]))
            drafts[row][1].append(float(sure[row]))
            if int(newest[row]) in network.ends:
                going.remove(row)
        if not going:
            break
    return drafts


def play(
    recordings: Sequence[Recording],
    stop: str,
    *,
    shared: bool,
    num_layers: int,
    max_tokens: int = MAX_TOKENS,
    power: float = 1.0,
) -> np.ndarray:
    """[N, 3] tokens, target forwards, and layers run for drafts, of each answer."""

    def new_statistics() -> ExitStatistics:
        return ExitStatistics(list(range(1, num_layers)), DEFAULTS.decay)

    statistics, counts = new_statistics(), []
    for answer in recordings:
        if not shared:
            statistics = new_statistics()

        window = 1 if statistics.counts.any() else PROMPT_WINDOW
        sure = answer.sure**power
        place = slice(max(0, answer.prompt - window), answer.prompt)
        statistics.update(answer.hits[place], sure[place], new_round=False)
        known, forwards, layers = answer.prompt + 1, 1, 0
        while known < len(answer.tokens):
            left = answer.prompt + max_tokens - known
            draft, exit = _draft(answer, known, left, statistics, stop, power)
            layers += len(draft) * exit
            right = answer.tokens[known:]
            accepted = 0
            while accepted < min(len(draft), len(right)) and (
                draft[accepted] == right[accepted]
            ):
                accepted += 1
            begin, known = known - 1, min(known + accepted + 1, len(answer.tokens))
            place = slice(begin, known - 1)
            statistics.update(answer.hits[place], sure[place])
            forwards += 1
        counts.append((len(answer.tokens) - answer.prompt, forwards, layers))
    return np.array(counts)


def _draft(
    answer: Recording,
    known: int,
    left: int,
    statistics: ExitStatistics,
    stop: str,
    power: float,
) -> tuple[list[int], int]:
    """The draft of a round, and its exit; the text may get `left` more tokens."""
    if left < 2:
        return [], 0
    num_layers = len(statistics.exits) + 1
    choice = statistics.choose(num_layers, min(MOST, left - 1))
    if not choice.length:
        return [], 0
    tokens, sure = answer.drafts[known, choice.exit]
    product = 1.0
    for drafted, confidence in enumerate(sure, 1):
        product *= confidence**power
        if not goes_on(stop, choice, drafted, confidence**power, product):
            return tokens[:drafted], choice.exit
    return tokens[: choice.most], choice.exit


def rate(counts: np.ndarray, num_layers: int) -> float:
    """Tokens for as many layers as the model has; 1 without drafts."""
    tokens, forwards, layers = counts.sum(0)
    return float(tokens / (num_layers * forwards + layers) * num_layers)


def table(recordings: Sequence[Recording], num_layers: int) -> str:
    """Markdown: a row per rule and kind of statistics."""
    heads = ["statistics", "`stop`", f"tokens per {num_layers} layers", "less default"]
    heads += [f"p^{power:g}" for power in POWERS if power != 1]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(recordings), (RESAMPLINGS, len(recordings)))
    for statistics in ("shared", "request"):
        replay = partial(
            play, recordings, shared=statistics == "shared", num_layers=num_layers
        )
        default = replay(DEFAULTS.stop)
        for stop in STOPS:
            own = replay(stop)
            gains = [
                rate(own[pick], num_layers) - rate(default[pick], num_layers)
                for pick in picks
            ]
            low, high = np.percentile(gains, [2.5, 97.5])
            cells = [statistics, f"`{stop}`", f"{rate(own, num_layers):.3f}"]
            cells.append("" if stop == DEFAULTS.stop else f"{low:+.3f} to {high:+.3f}")
            for power in POWERS:
                if power != 1:
                    counts = replay(stop, power=power)
                    cells.append(f"{rate(counts, num_layers):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Record, replay, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exit_replay", description=__doc__
    )
    parser.add_argument(
        "--num-problems",
        type=int,
        default=300,
        help="held-out questions for llama-tiny (default: %(default)s)",
    )
    args = parser.parse_args()
    network = Network(resolve(TARGET))
    recordings = [
        record(network, encode_prompt(problem.question, chat=False), MAX_TOKENS)
        for problem in tqdm(sample_problems(args.num_problems, 0, "heldout"))
    ]
    print(f"{TARGET}, {args.num_problems} questions, greedy, float32\n")
    print(table(recordings, len(network.layers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
