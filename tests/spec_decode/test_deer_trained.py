# SPDX-License-Identifier: Apache-2.0
"""The built-in block-causal drafter: context "cached" on trained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from spec_decode.deer_reference import Steps, TrainedReference, speculative
from spec_decode.harness import Engine, Rounds, params

from vllm_dlm.config.aliases import resolve
from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import sample_problems

TARGET, DRAFTER = "llama-tiny", "deer-tiny-block"
MASKS = 32
LENGTH = 128
"""Of the context."""
PROMPTS = [
    tokenizer.encode_prompt(problem.question, chat=number % 2 == 0)
    for number, problem in enumerate(sample_problems(22, 5, "heldout"))
]
ANSWER = params(24, ignore_eos=False, stop_token_ids=[tokenizer.EOS_ID])
# Three pages, and it ends inside a page and inside a block.
LONG = [token for prompt in PROMPTS for token in prompt][:75]


@pytest.fixture(scope="module")
def deer(engines: Callable[..., Engine]) -> Callable[..., Engine]:
    def engine(context: str = "auto") -> Engine:
        options: Any = speculative(DRAFTER, context, MASKS)
        return engines(options, model=TARGET, max_model_len=LENGTH)

    return engine


def submitted(engine: Engine) -> tuple[list[list[int]], dict[tuple[int, ...], Any]]:
    """Answers, and the draft behind every text that had one."""
    rounds = Rounds(engine.drafter)
    answers = engine.run(PROMPTS, ANSWER)
    rounds.close()
    assert not engine.drafter.failed
    drafts = {
        tuple(text): draft for of in rounds.of.values() for text, draft in of if draft
    }
    return answers, drafts


@pytest.mark.slow
def test_answers_and_drafts(
    engines: Callable[..., Engine], deer: Callable[..., Engine]
):
    engine = deer()
    assert engine.drafter.context == "cached"
    rounds = Rounds(engine.drafter)
    answers = engine.run(PROMPTS, ANSWER)
    rounds.close()
    assert not engine.drafter.failed
    plain = engines(model=TARGET, max_model_len=LENGTH)
    assert answers == plain.run(PROMPTS, ANSWER)
    # As the oracle drafts, which keeps no keys.
    TrainedReference(Path(resolve(DRAFTER))).check(rounds)
    drafted = sum(bool(draft) for of in rounds.of.values() for _, draft in of)
    # A first token comes with the prompt; each round adds one of the target's own.
    accepted = sum(map(len, answers)) - len(answers) - drafted
    assert accepted / drafted > 3.5


@pytest.mark.parametrize(
    "context", ["cached", pytest.param("recompute", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_drafter_rows(context: str, deer: Callable[..., Engine]):
    engine = deer(context)
    for prompt in (PROMPTS[0], LONG):
        steps = Steps(engine.drafter)
        engine.run([prompt], params(20))
        steps.close()
        assert engine.drafter.counts == steps.counts(context, block=4)
        assert len(steps.of) > 2


@pytest.mark.slow
def test_recomputing_drafts_the_same(deer: Callable[..., Engine]):
    answers, drafts = submitted(deer())
    engine = deer("recompute")
    assert engine.drafter.context == "recompute"
    assert submitted(engine) == (answers, drafts)
