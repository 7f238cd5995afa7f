# SPDX-License-Identifier: Apache-2.0
"""How many held-out problems an engine answers right with llada-forms.

Free answers, answers held to the problem's JSON schema, and canvases with holes: the
requests are those that a user would send.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_dlm.tasks.forms.problems import KINDS, Problem, held_out_problems
from vllm_dlm.tasks.forms.rows import encode_row

if TYPE_CHECKING:
    from vllm import LLM

MAX_TOKENS = 96
HOLES = ("scaffold", "form", "sentence", "suffix")
"""Kinds whose canvas has text beside the holes; the others are answered freely."""
WITH_SCHEMA = ("extract", "listed", "forced call")


@dataclass(frozen=True)
class Answers:
    """What an engine made of problems of one kind.

    Args:
        right: Share of right answers.
        valid: Share of answers that are JSON; None where that is not asked for.
        forwards: Forwards of a request, on average.
    """

    right: float
    valid: float | None
    forwards: float


def is_json(text: str) -> bool:
    """Whether a text is JSON."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def same_json(left: str, right: str) -> bool:
    """Whether two texts are the same JSON value, with keys in the same order."""
    try:
        return json.dumps(json.loads(left)) == json.dumps(json.loads(right))
    except ValueError:
        return False


def is_answer(problem: Problem, text: str) -> bool:
    """Whether a text is a problem's answer; JSON is compared as a value."""
    return text.strip() == problem.answer or same_json(text, problem.answer)


def answer(
    llm: LLM, problems: Sequence[Problem], *, with_schema: bool = False
) -> Answers:
    """Answer problems greedily, all in one call.

    Args:
        llm: an engine of llada-forms.
        problems: of one kind.
        with_schema: hold the answers to the problems' schemas.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import StructuredOutputsParams

    rng = random.Random(f"forms-width-{problems[0].kind}")
    prompts, params = [], []
    for problem in problems:
        row = encode_row(problem, rng)
        options: dict[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS}
        if problem.kind in HOLES:
            if problem.open_end and problem.pieces[-1].is_hole:
                row = row.widen(len(row.prompt) + max(MAX_TOKENS, len(row.canvas)))
            dlm = {"canvas": row.masked, "holes": "shrink"}
            options |= {"max_tokens": len(row.canvas), "extra_args": {"dlm": dlm}}
        elif with_schema:
            options["structured_outputs"] = StructuredOutputsParams(json=problem.schema)
        prompts.append(TokensPrompt(prompt_token_ids=row.prompt))
        params.append(SamplingParams(**options))
    results = llm.generate(prompts, params, use_tqdm=False)
    outputs = [result.outputs[0] for result in results]
    wants_json = with_schema or problems[0].kind in WITH_SCHEMA
    return Answers(
        right=_share(
            is_answer(problem, output.text)
            for problem, output in zip(problems, outputs, strict=True)
        ),
        valid=_share(is_json(output.text) for output in outputs)
        if wants_json
        else None,
        forwards=sum(sum(output.spec_decode_metrics.histogram) for output in outputs)
        / len(outputs),
    )


def _share(truths: Any) -> float:
    found = list(truths)
    return sum(found) / len(found)


def accuracy_table(llm: LLM, per_kind: int, seed: int) -> str:
    """Markdown table of all kinds, without and with a schema."""
    lines = [
        "| kind | right | JSON | forwards | with the schema: right | JSON | forwards |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        problems = held_out_problems(kind, per_kind, seed)
        # A call that is forced is forced by its schema.
        free = None if kind == "forced call" else answer(llm, problems)
        held = answer(llm, problems, with_schema=True) if kind in WITH_SCHEMA else None
        lines.append(f"| {kind} | {_cells(free)} | {_cells(held)} |")
    return "\n".join(lines)


def _cells(found: Answers | None) -> str:
    if found is None:
        return " | ".join(["-"] * 3)
    valid = "-" if found.valid is None else f"{100 * found.valid:.1f} %"
    return f"{100 * found.right:.1f} % | {valid} | {found.forwards:.1f}"
