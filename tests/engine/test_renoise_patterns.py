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
from engine.test_no_waits import Waits
from jsonschema import Draft202012Validator
from reference.diffusion_gemma import WINDOW
from reference.diffusion_gemma_patterns import Moves, generate_matching
from tiers import fast
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_dlm.constraints.automaton import compile_pattern
from vllm_dlm.constraints.cache import Source
from vllm_dlm.constraints.vocabulary import Vocabulary
from vllm_dlm.kernels.draw import random_tokens, row_key, token_noise
from vllm_dlm.model_executor import patterns

CANVAS, VOCABULARY, STEPS = 16, 260, 6
ENDS = [1, EOS]
SPELLED = [*(bytes([byte]) for byte in range(256)), b"unused", b"", b"", b""]
"""What each token of the model reads."""
WORDS = r"[a-z]{2,4}( [a-z]{2,5}){2,7}"
LONG = r"[a-z]{36,}"
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
BOLD = {"dlm": {"strategy_config": {"entropy_bound": 1000}}}
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


def text_of(found: Finished, also_ends: list[int] | None = None) -> str:
    own = [*ENDS, *(also_ends or [])]
    ends = [at for at, token in enumerate(found.tokens) if token in own]
    assert ends in ([], [len(found.tokens) - 1])
    assert found.output.finish_reason == ("stop" if ends else "length")
    kept = found.tokens[: ends[0] if ends else None]
    return b"".join(map(SPELLED.__getitem__, kept)).decode()


def moves_of(pattern: str) -> Moves:
    machine = compile_pattern(pattern, Vocabulary.of_tokens(SPELLED), ENDS)
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
    """Of three canvases, the last one of which the text takes a part; batch 1 and 7."""
    pattern = Source("json", json.dumps(SCHEMA)).pattern()
    cases: list[tuple[list[int], str, dict[str, Any], dict[str, Any]]] = [
        (PROMPTS[0], WORDS, {"regex": WORDS}, {"temperature": 1.0}),
        (PROMPTS[1], pattern, {"json": SCHEMA}, {"temperature": 0.0}),
        (PROMPTS[2], pattern, {"json": SCHEMA}, {"temperature": 0.6}),
        # So bold that it accepts all of it, sure or not, behind the text too.
        (PROMPTS[2], LONG, {"regex": LONG} | BOLD, {"temperature": 1, "bound": 1000}),
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
    assert len(together[3].tokens) > 2 * CANVAS
    # Neighbours are what they are without such neighbours.
    alone = [
        gemma.run([prompt], [one])[0]
        for prompt, one in zip([*prompts, *PROMPTS[:2]], [*asks, *free], strict=True)
    ]
    assert alone == together


def test_tiles_of_logits_change_nothing(gemma: Engine, monkeypatch):
    """What is fed takes rows of logits again, which no longer exist."""
    asks = [
        ask(40, 2, json=SCHEMA),
        ask(40, 2, 0.0, regex=WORDS, logit_bias={98: 4.0}),
        ask(40, 3, regex=WORDS, top_k=9, min_p=0.01),
    ]
    expected = gemma.run(PROMPTS, asks)
    monkeypatch.setitem(vars(gemma.runner.sampler.facts), "tile_rows", 7)
    assert gemma.run(PROMPTS, asks) == expected


PATTERNS = {
    "words": {"regex": WORDS},
    "schema": {"json": SCHEMA},
    "one of two": {"choice": ["yes, of course", "no"]},
    "rules": {"grammar": 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9]+ | "none"'},
    # As many tokens as there are at most; any number; letters of several bytes.
    "all there is": {"regex": r"\d{40}"},
    "any length": {"regex": "(ab|c)*"},
    "letters": {"regex": "[à-ö]{1,9}(€[^x]?)*"},
    "loose": {"regex": r"[^<>]*"},
}
LIMITS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_p": 0.5, "min_tokens": 9},
    {"min_p": 0.2, "logit_bias": {98: 5.0, 99: -5.0}},
    {"stop_token_ids": [2], "logprobs": 1, "dlm": {"step_map": True}},
]


def check(name: str, text: str) -> None:
    ((kind, wanted),) = PATTERNS[name].items()
    if kind == "json":
        Draft202012Validator(wanted).validate(json.loads(text))
    elif kind == "choice":
        assert text in wanted
    else:
        rules = r"\[(\d+|none)(,(\d+|none))*\]"
        assert re.fullmatch(wanted if kind == "regex" else rules, text), text


def check_all(gemma: Engine, names: list[str], seed: int) -> None:
    asks, prompts = [], []
    for number, name in enumerate(names):
        limit = dict(LIMITS[(seed + number) % len(LIMITS)])
        if name in ("schema", "one of two"):
            limit.pop("min_tokens", None)
        temperature = (1.0, 0.0, 0.3, 1.5)[(seed + number // 2) % 4]
        asks.append(ask(40, seed, temperature, **PATTERNS[name], **limit))
        prompts.append(PROMPTS[(seed + number) % len(PROMPTS)])
    for name, one, found in zip(names, asks, gemma.run(prompts, asks), strict=True):
        check(name, text_of(found, one.stop_token_ids))
        assert len(found.tokens) >= one.min_tokens


@pytest.mark.parametrize("seed", fast(0, 1, of=range(24)))
def test_texts_match(gemma: Engine, seed: int):
    check_all(gemma, [*PATTERNS], seed)


def test_tokens_that_are_ruled_out_are_not_written(gemma: Engine):
    allowed = [*b"abc", EOS]
    (found,) = gemma.run(
        PROMPTS[:1], ask(40, 1, regex="[a-z]{20,}", allowed_token_ids=allowed)
    )
    assert {*found.tokens} <= {*allowed}


def test_the_engine_reads_what_admission_has_compiled(gemma: Engine, monkeypatch):
    """Ends of texts that only generation_config.json, or the tokenizer, names too."""

    def compiles(*args: object) -> None:
        raise AssertionError("the engine compiles a pattern itself")

    monkeypatch.setattr(patterns, "compile_answer", compiles)
    (found,) = gemma.run(PROMPTS[:1], ask(20, regex="[0-9]+!"))
    assert re.fullmatch("[0-9]+!", text_of(found))


def test_a_preempted_canvas_is_replayed(gemma: Engine):
    asks = [ask(44, 5, regex=WORDS), ask(44, 6, 0.5, json=SCHEMA)]
    expected = gemma.run(PROMPTS[:2], asks)
    ids = [gemma.add(*one) for one in zip(PROMPTS[:2], asks, strict=True)]
    preempted = []

    def preempt(step: int) -> None:
        if step in (2, STEPS + 3, 2 * STEPS + 5) and gemma.scheduler.running:
            preempted.append(gemma.scheduler.running[-1].request_id)
            gemma.preempt(preempted[-1])

    done = gemma.drive(preempt)
    assert len(preempted) >= 2
    assert [list(done[number].outputs[0].token_ids) for number in ids] == [
        one.tokens for one in expected
    ]


def test_chunked_prompts_and_found_pages_change_nothing(
    gemma: Engine, engines: Callable[..., Engine], folder: Path
):
    small = engines(
        {"diffusion_gemma": "engine"},
        model=str(folder),
        max_model_len=160,
        max_num_batched_tokens=48,
        enable_prefix_caching=True,
        weight_transfer_config=None,
    )
    prompt = [(11 * i + 3) % 120 + 2 for i in range(100)]
    one = ask(44, 9, json=SCHEMA)
    expected = gemma.run([prompt], one)[0].tokens
    assert small.run([prompt], one)[0].tokens == expected
    again = small.outputs([prompt], one)[0]
    assert list(again.outputs[0].token_ids) == expected
    assert again.num_cached_tokens > 0


def test_steps_wait_for_nothing_but_the_paths(gemma: Engine):
    """What paths need comes in one transfer, which this does not count."""
    for seed in range(3):
        gemma.add(PROMPTS[seed], ask(40, seed, top_k=4 * seed, regex=WORDS))
    gemma.step()
    with Waits() as waits:
        for _ in range(4):
            gemma.step()
    gemma.drive(lambda step: None)
    assert not waits.seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dlm", "options"),
    [
        ({"commit": "separate"}, {}),
        ({}, {"async_scheduling": True}),
        ({}, {"enforce_eager": False}),
    ],
)
def test_how_forwards_are_made_changes_nothing(
    gemma: Engine,
    engines: Callable[..., Engine],
    folder: Path,
    dlm: dict[str, Any],
    options: dict[str, Any],
):
    engine = engines(
        {"diffusion_gemma": "engine", **dlm},
        model=str(folder),
        max_model_len=160,
        weight_transfer_config=None,
        **options,
    )
    asks = [
        ask(44, 1, regex=WORDS),
        ask(44, 2, 0.0, json=SCHEMA),
        ask(44, 3, ignore_eos=True),
    ]
    expected = [one.tokens for one in gemma.run(PROMPTS, asks)]
    assert [one.tokens for one in engine.run(PROMPTS, asks)] == expected


def test_what_a_request_has_written_stays(gemma: Engine):
    """Holes are filled so that the whole text matches."""
    dlm = {"canvas_text": "name={{6}}, age {{19}}; ok"}
    none = ask(40, regex=r"name=[A-Z]{7}, .*", dlm=dlm)
    with pytest.raises(VLLMValidationError, match="canvas's tokens at their places"):
        gemma.run(PROMPTS[:1], none)
    pattern = r"name=\w{6}, age \d{1,3}(, [a-z]{3,9})*; ok"
    asks = [
        ask(40, seed, temperature, regex=pattern, dlm=dlm)
        for seed, temperature in ((1, 1.0), (2, 0.0), (3, 0.4))
    ]
    for found in gemma.run(PROMPTS, asks):
        assert re.fullmatch(pattern, text_of(found))


def test_what_cannot_be_kept_is_refused(gemma: Engine):
    for options, says in (
        ({"max_tokens": 9, "json": SCHEMA}, "max_tokens to at least"),
        ({"regex": "a+", "ignore_eos": True}, "cannot be combined with ignore_eos"),
        ({"regex": "a+", "bad_words": ["x"]}, "bad_words"),
        ({"regex": r"\bword"}, "regex"),
    ):
        with pytest.raises(VLLMValidationError, match=says):
            gemma.run(PROMPTS[:1], ask(**options))
