# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma's texts under a pattern: those of plain loops, and all of them match.

The tokens are bytes, and two of them end a text: byte 1, and the tokenizer's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import EOS, write_byte_gemma
from engine.harness import Engine, Finished, params
from reference.diffusion_gemma import WINDOW
from reference.diffusion_gemma_patterns import Moves, generate_matching
from vllm.sampling_params import StructuredOutputsParams

from vllm_dlm.constraints.automaton import compile_pattern
from vllm_dlm.constraints.cache import Source
from vllm_dlm.constraints.vocabulary import Vocabulary
from vllm_dlm.kernels.draw import random_tokens, row_key, token_noise

CANVAS, VOCABULARY, STEPS = 16, 260, 6
ENDS = [1, EOS]
WORDS = r"[a-z]{2,4}( [a-z]{2,5}){2,7}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "[A-Z][a-z]{1,6}"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
}
PROMPTS = [list(b"Who?"), list(b"Ada is 31."), list(b"No")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_gemma(tmp_path_factory.mktemp("model") / "gemma", CANVAS)


@pytest.fixture(scope="module")
def gemma(engines: Callable[..., Engine], folder: Path) -> Engine:
    return engines(
        {"diffusion_gemma": "engine"},
        model=str(folder),
        max_model_len=160,
        weight_transfer_config=None,
    )


def ask(max_tokens: int = 44, seed: int = 1, temperature: float = 1.0, **options: Any):
    """Sampling parameters; what vLLM calls a kind of constraint is one."""
    kinds = ("regex", "json", "choice", "grammar")
    kind = {name: options.pop(name) for name in kinds if name in options}
    constraint = StructuredOutputsParams(**kind) if kind else None
    return params(
        max_tokens,
        seed=seed,
        temperature=temperature,
        structured_outputs=constraint,
        **options,
    )


def text_of(found: Finished) -> str:
    ends = [at for at, token in enumerate(found.tokens) if token in ENDS]
    assert ends in ([], [len(found.tokens) - 1])
    assert found.output.finish_reason == ("stop" if ends else "length")
    return bytes(found.tokens[: ends[0] if ends else None]).decode()


def moves_of(pattern: str) -> Moves:
    tokens = [bytes([byte]) for byte in range(256)] + [b""] * (VOCABULARY - 256)
    machine = compile_pattern(pattern, Vocabulary.of_tokens(tokens), ENDS)
    class_of = torch.tensor(machine.class_of).long()
    follows = torch.tensor(machine.transitions).long()[:, class_of]
    follows = torch.where(class_of >= 0, follows, -1)
    return Moves(follows, torch.tensor(machine.accepting), ENDS, machine.start)


def expected(
    folder: Path, prompt: list[int], pattern: str, max_tokens: int, seed: int, **how
) -> tuple[list[int], int]:
    """What plain loops write with the random numbers of our engine."""

    def place(canvas: int, step: int) -> tuple[torch.Tensor, ...]:
        first = len(prompt) + canvas * CANVAS
        positions = torch.arange(first, first + CANVAS)
        return torch.tensor(seed), positions, torch.tensor(step)

    assert len(prompt) + -(-max_tokens // CANVAS) * CANVAS <= WINDOW
    return generate_matching(
        folder,
        prompt,
        moves_of(pattern),
        max_tokens,
        lambda *at: random_tokens(*place(*at), VOCABULARY),
        lambda *at: token_noise(row_key(*place(*at)), torch.arange(VOCABULARY)),
        **how,
    )


def test_texts_are_those_of_plain_loops(gemma: Engine, folder: Path):
    """Of three canvases, the last one of which the text takes a part; batch 1 and 6."""
    pattern = Source("json", json.dumps(SCHEMA)).pattern()
    cases: list[tuple[list[int], str, dict[str, Any], dict[str, Any]]] = [
        (PROMPTS[0], WORDS, {"regex": WORDS}, {"temperature": 1.0}),
        (PROMPTS[1], pattern, {"json": SCHEMA}, {"temperature": 0.0}),
        (PROMPTS[2], pattern, {"json": SCHEMA}, {"temperature": 0.6}),
        (
            PROMPTS[1],
            WORDS,
            {"regex": WORDS, "logit_bias": {97: 9.0}},
            {"temperature": 0.6, "bias": {97: 9.0}},
        ),
    ]
    free = [ask(44, seed, ignore_eos=True) for seed in (7, 8)]
    asks = [
        ask(44, seed, how["temperature"], **what)
        for seed, (_, _, what, how) in enumerate(cases)
    ]
    prompts = [case[0] for case in cases]
    together = gemma.run([*prompts, *PROMPTS[:2]], [*asks, *free])
    for seed, (prompt, match, _, how) in enumerate(cases):
        tokens, forwards = expected(folder, prompt, match, 44, seed, **how)
        assert (together[seed].tokens, together[seed].forwards) == (tokens, forwards)
        assert re.fullmatch(match, text_of(together[seed]))
    assert max(len(one.tokens) for one in together[:4]) > 2 * CANVAS
    # Neighbours are what they are without such neighbours.
    alone = [
        gemma.run([prompt], [one])[0]
        for prompt, one in zip([*prompts, *PROMPTS[:2]], [*asks, *free], strict=True)
    ]
    assert alone == together
