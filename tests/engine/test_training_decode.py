# SPDX-License-Identifier: Apache-2.0
"""A training's own decoding: the oracle's tokens in its number of forwards.

The same requests as `test_parity.py` sends to an engine, with the same options.
"""

from pathlib import Path

import pytest
from engine.cases import Case, assert_equal, expect, make_prompt
from engine.harness import Finished
from reference.llada import TinyLLaDA
from tiers import fast

RULES = (
    "static/low_confidence",
    "threshold",
    "entropy",
    "eb",
    "cad/confidence",
    "localleap",
    "joint/plain",
    "joint/edit",
    "saber",
    "ass",
    "eoser/even",
    "eoser/doubling",
)


def cases_of(rule: str) -> list[Case]:
    """Of several prompts, in blocks of two lengths, some with a shorter schedule."""
    whole = rule.partition("/")[0] in ("ass", "eoser")
    return [
        Case(
            make_prompt(length, seed=length),
            rule=rule,
            block=24 if whole else block,
            max_tokens=24 if whole else 3 * block,
            steps=9 if fewer else None,
        )
        for length, block, fewer in (
            (1, 8, False),
            (5, 8, True),
            (17, 16, False),
            (30, 16, True),
        )
    ]


@pytest.mark.parametrize(
    "rule", fast("threshold", "joint/edit", "eoser/even", of=RULES)
)
def test_it_writes_what_the_oracle_writes(
    checkpoint: Path, oracle: TinyLLaDA, rule: str
):
    from vllm_dlm.training.decoding import decode
    from vllm_dlm.training.learner import load_learner

    learner = load_learner(checkpoint)
    cases = cases_of(rule)
    got = []
    for case in cases:
        options = dict((case.params().extra_args or {})["dlm"])
        # What a request leaves out says the same as null.
        options = {name: value for name, value in options.items() if value is not None}
        # Beside another prompt: no row sees its neighbour.
        [one, _] = decode(
            learner, [case.prompt, make_prompt(40)], options, case.max_tokens
        )
        got.append(Finished(one.tokens, one.forwards, output=None))  # type: ignore[arg-type]
    assert_equal(cases, got, [expect(case, oracle) for case in cases])


def test_what_takes_an_engine_is_refused(checkpoint: Path):
    from vllm_dlm.training.decoding import decode
    from vllm_dlm.training.learner import load_learner

    learner = load_learner(checkpoint)
    for options in (
        {"cache": "dual"},
        {"strategy": "lopa"},
        {"eotp": "block"},
        {"growth": "daedal"},
        {"strategy": "klass"},
    ):
        with pytest.raises(ValueError, match="takes an engine"):
            decode(learner, [[1]], options, 32)
    with pytest.raises(ValueError, match="entropi"):
        decode(learner, [[1]], {"strategy": "entropi"}, 32)


def test_a_decoding_leaves_the_learner_as_it_was(checkpoint: Path):
    from vllm_dlm.training.decoding import decode
    from vllm_dlm.training.learner import load_learner

    learner = load_learner(checkpoint)
    assert learner.network.training
    before = {name: one.clone() for name, one in learner.network.state_dict().items()}
    decode(learner, [[1, 5]], {"strategy": "static"}, 8)
    assert learner.network.training
    assert all(
        (one == before[name]).all()
        for name, one in learner.network.state_dict().items()
    )
