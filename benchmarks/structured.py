# SPDX-License-Identifier: Apache-2.0
"""What holding a text to a pattern costs in each denoise step, part by part.

    python -m benchmarks.structured --vocabulary qwen.tiktoken

    python -m benchmarks.structured --model FOLDER

The vocabulary is a file of byte tokens as tiktoken has them; the wheel of the package
dashscope holds one of 151,643 tokens. No model is needed: logits are random. All parts
run on one core of the CPU, as those of one request do.

With a model, of which the tokenizer can spell JSON, requests are decoded with a schema
and without: forwards, the CPU time of one, and tokens in a second of it. `llada-forms`
is asked what it was trained for, held-out problems, and its answers are checked; any
other model gets the schemas below.
"""

from __future__ import annotations

import argparse
import base64
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_dlm.constraints.automaton import Automaton, compile_pattern
from vllm_dlm.constraints.paths import (
    BEST,
    OPEN,
    TOTAL,
    Drawing,
    Graph,
    Problem,
    solve,
)
from vllm_dlm.constraints.schema import schema_pattern
from vllm_dlm.constraints.vocabulary import Vocabulary
from vllm_dlm.kernels.class_stats import TokenClasses, class_draws, class_stats
from vllm_dlm.kernels.token_stats import token_stats
from vllm_dlm.tasks.forms.evaluation import MAX_TOKENS, is_answer
from vllm_dlm.tasks.forms.problems import held_out_problems
from vllm_dlm.tasks.forms.rows import encode_row


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


STRING: dict[str, Any] = {"type": "string", "maxLength": 40}

SCHEMAS: dict[str, dict[str, Any]] = {
    "name and age": _object(name=STRING, age={"type": "integer"}),
    "person, 7 fields": _object(
        name=STRING,
        age={"type": "integer"},
        email=STRING,
        married={"type": "boolean"},
        height={"type": "number"},
        address=_object(street=STRING, city=STRING),
        tags={"type": "array", "items": STRING, "maxItems": 5},
    ),
    "tool call": _object(
        name={"enum": ["get_weather", "get_time", "search"]},
        arguments=_object(
            city={"type": "string"}, when={"type": "string", "format": "date-time"}
        ),
    ),
}


SETTINGS: dict[str, dict[str, Any]] = {
    "one token a step": {"strategy": "static"},
    "threshold 0.9": {"strategy": "threshold", "strategy_config": {"threshold": 0.9}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vocabulary", type=Path)
    what.add_argument("--model")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if args.model:
        decode(args.model, args.requests, args.repeats)
        return
    torch.set_num_threads(1)
    tokens = [
        base64.b64decode(line.split()[0])
        for line in args.vocabulary.read_bytes().splitlines()
        if line.strip()
    ]
    end = len(tokens)
    vocabulary = Vocabulary.of_tokens([*tokens, b""])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(args.block_length, vocabulary.size, generator=generator) * 3
    print(
        f"{vocabulary.size} tokens, blocks of {args.block_length}, float32; "
        f"milliseconds, the fastest of {args.repeats}"
    )
    rows = fastest(lambda: token_stats(logits, True, True), args.repeats)
    print(f"statistics of rows, which every request needs: {rows:.1f}\n")
    print("| schema | S | K | E | compile | classes | path | all | drawn: all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, schema in SCHEMAS.items():
        pattern = schema_pattern(schema)
        started = time.perf_counter()
        automaton = compile_pattern(pattern, vocabulary, [end])
        seconds = time.perf_counter() - started
        numbers = measured(automaton, logits, args.repeats)
        graph = Graph.of(automaton)
        states, classes = automaton.transitions.shape
        print(
            f"| {name} | {states} | {classes} | {len(graph.klass)} "
            f"| {1000 * seconds:.0f} | "
            + " | ".join(f"{number:.1f}" for number in numbers)
            + " |"
        )


def measured(automaton: Automaton, logits: torch.Tensor, repeats: int) -> list[float]:
    """Milliseconds of a step: statistics by class, path and posterior, both; drawn."""
    graph, count = Graph.of(automaton), len(logits)
    classes = TokenClasses.of(
        automaton.class_of, automaton.transitions.shape[1], logits.device
    )
    fixed = np.full(count, OPEN)
    end = automaton.min_length <= 512
    numbers = class_stats(logits, classes).numpy()
    rows, ones = torch.arange(count), torch.ones(count)
    top = logits.amax(dim=1)

    def greedy() -> None:
        solve(Problem(graph, automaton.start, end, fixed, numbers))

    def drawn() -> None:
        parts = class_stats(logits, classes).numpy()
        weights = class_stats(logits, classes, 1 / 0.7).numpy()
        scores, tokens, own = class_draws(
            logits, classes, top, ones * 0.7, rows, rows, rows
        )
        drawing = Drawing(
            weights[..., BEST] + np.log(weights[..., TOTAL]),
            scores.numpy(),
            tokens.double().numpy(),
            own.numpy(),
        )
        solve(Problem(graph, automaton.start, end, fixed, parts, drawing))

    by_class = fastest(lambda: class_stats(logits, classes), repeats)
    path = fastest(greedy, repeats)
    return [by_class, path, by_class + path, fastest(drawn, repeats)]


Ask = tuple[Any, dict[str, Any] | None]
"""A prompt of token ids or text, and the schema of its answer, if it has one."""


def decode(model: str, count: int, repeats: int) -> None:
    """Print what requests take with each schema, and without one."""
    # In this process, whose time is counted: that of others on the machine is not.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    torch.set_num_threads(1)
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_dlm import LLM

    is_forms = model == "llada-forms"
    llm = LLM(
        model,
        max_model_len=512,
        max_num_seqs=count,
        dtype="float32",
        enforce_eager=True,
        dlm_online_learning=False,
    )
    problems = held_out_problems("listed", count, 1) if is_forms else []

    def asks(schema: dict[str, Any] | None, *, is_held: bool) -> list[Ask]:
        if not problems:
            return [(f"Person {number} as JSON: ", schema) for number in range(count)]
        rows = [encode_row(problem, random.Random(0)).prompt for problem in problems]
        return [
            ({"prompt_token_ids": row}, problem.schema if is_held else None)
            for row, problem in zip(rows, problems, strict=True)
        ]

    kinds: dict[str, list[Ask]] = {"none": asks(None, is_held=False)}
    if problems:
        kinds["the answer's"] = asks(None, is_held=True)
    else:
        kinds |= {name: asks(each, is_held=True) for name, each in SCHEMAS.items()}
    print(
        "| strategy | schema | right | forwards | tokens | a forward | ms a forward "
        "| tokens/s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for strategy, options in SETTINGS.items():
        for name, asked in kinds.items():
            sampling = [
                SamplingParams(
                    temperature=0,
                    max_tokens=MAX_TOKENS if problems else 256,
                    structured_outputs=None
                    if schema is None
                    else StructuredOutputsParams(json=schema),
                    extra_args={"dlm": options | {"block_length": 32, "eotp": "block"}},
                )
                for _, schema in asked
            ]
            prompts = [prompt for prompt, _ in asked]
            seconds = float("inf")
            for _ in range(1 + repeats):
                started = time.process_time()
                results = llm.generate(prompts, sampling, use_tqdm=False)
                seconds = min(seconds, time.process_time() - started)
            outputs = [result.outputs[0] for result in results]
            forwards = sum(sum(o.spec_decode_metrics.histogram) for o in outputs)
            tokens = sum(len(output.token_ids) for output in outputs)
            right = sum(
                is_answer(problem, output.text)
                for problem, output in zip(problems, outputs, strict=False)
            )
            print(
                f"| {strategy} | {name} "
                f"| {f'{100 * right / count:.0f} %' if problems else '-'} "
                f"| {forwards / count:.1f} "
                f"| {tokens / count:.1f} | {tokens / forwards:.2f} "
                f"| {1000 * seconds / forwards:.2f} "
                f"| {tokens / seconds:.0f} |",
                flush=True,
            )


def fastest(function: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


if __name__ == "__main__":
    main()
