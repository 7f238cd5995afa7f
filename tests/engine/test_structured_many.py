# SPDX-License-Identifier: Apache-2.0
"""Random patterns and schemas on tiny random models: all texts match.

400 of them for each, a masked model and DiffusionGemma, or as many as the variable
RANDOM_PATTERNS says. With `-s` it says how many are taken, and how many refused.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from byte_model import EOS, write_byte_gemma, write_byte_model
from constraints.random_cases import patterns, schemas
from engine.harness import Engine, params
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

TOGETHER = 20
EXAMPLES = int(os.environ.get("RANDOM_PATTERNS", "400")) // (2 * TOGETHER)
"""So many of each kind, this number at a time."""
LENGTH = 96
BYTES_OF = {256: b"unused"}
"""Of the one token of text that is no byte."""
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "threshold", "strategy_config": {"threshold": 0.02}},
    {"strategy": "static", "steps": 12},
    {"strategy": "saber", "strategy_config": {"fewest": 4}},
    {"strategy": "eb", "strategy_config": {"bound": 10.0}},
]
"""Bold, so that a random model writes many tokens in a step: that must match, too."""
ENDS = ("block", "canvas", "off")
"""Of the option `eotp`."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(14_400)]


@pytest.fixture(scope="module", params=["masks", "random tokens"])
def spelling(
    request: pytest.FixtureRequest,
    engines: Callable[..., Engine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    # All of a batch at once: a step costs little more than one of a single text.
    sizes = {"max_num_seqs": TOGETHER, "num_gpu_blocks_override": TOGETHER * 8 + 1}
    folder = tmp_path_factory.mktemp("model")
    if request.param == "masks":
        return engines(model=str(write_byte_model(folder / "LLaDA-bytes")), **sizes)
    return engines(
        {"diffusion_gemma": "engine"},
        model=str(write_byte_gemma(folder / "gemma", 16)),
        weight_transfer_config=None,
        **sizes,
    )


@pytest.fixture
def tally() -> Iterator[Counter[str]]:
    """Counts what a test has asked for: most of it is to be taken."""
    counts: Counter[str] = Counter()
    yield counts
    print(dict(counts))
    assert counts["taken"] > counts["refused"]


def is_gemma(engine: Engine) -> bool:
    return bool(engine.llm.model_config.hf_config.dlm_noise == "uniform")


def how(engine: Engine, number: int) -> dict[str, Any]:
    """Options of one request of a batch."""
    if is_gemma(engine):
        # Half of them so bold that all drawn tokens are kept for a step.
        bound = (0.1, 1e3)[number % 2]
        return {"strategy_config": {"entropy_bound": bound, "max_denoising_steps": 4}}
    return {
        "block_length": (8, 32)[number % 2],
        "eotp": ENDS[number // 3 % len(ENDS)],
        **STRATEGIES[number // 2 % len(STRATEGIES)],
    }


def texts_of(
    engine: Engine, asked: list[dict[str, Any]], tally: Counter[str]
) -> list[tuple[Any, str]]:
    """The texts of those that are not refused, each with what it has to match."""
    wanted = []
    end_ids = (1, EOS) if is_gemma(engine) else (EOS,)
    for i, each in enumerate(asked):
        (what,) = each.values()
        options = params(
            LENGTH,
            dlm=how(engine, i),
            structured_outputs=StructuredOutputsParams(**each),
            **({"temperature": 1.0, "seed": i} if i % 3 else {}),
        )
        try:
            name = engine.add([1 + i, 2, 3], options)
        except VLLMValidationError as error:
            known = "json schema|too large|shortest match|no text|repeat|regex"
            assert re.search(known, str(error)), error
            tally["refused"] += 1
            continue
        wanted.append((name, what))
    tally["taken"] += len(wanted)
    done = engine.drive(lambda step: None)
    found = []
    for name, what in wanted:
        tokens = list(done[name].outputs[0].token_ids)
        ends = [at for at, token in enumerate(tokens) if token in end_ids]
        kept = tokens[: ends[0]] if ends else tokens
        written = b"".join(BYTES_OF.get(each) or bytes([each]) for each in kept)
        found.append((what, written.decode()))
    return found


many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # Smaller examples would be other batches, which take minutes.
    phases=[Phase.explicit, Phase.generate],
)


@given(st.lists(patterns, min_size=TOGETHER, max_size=TOGETHER))
@many
def test_random_patterns(spelling: Engine, tally: Counter[str], chosen: list[str]):
    asked = [{"regex": each} for each in chosen]
    for pattern, text in texts_of(spelling, asked, tally):
        assert re.fullmatch(pattern, text, re.ASCII), (pattern, text)


@given(st.lists(schemas, min_size=TOGETHER, max_size=TOGETHER))
@many
def test_random_schemas(spelling: Engine, tally: Counter[str], chosen: list[Any]):
    asked = [{"json": json.dumps(each)} for each in chosen]
    for schema, text in texts_of(spelling, asked, tally):
        Draft202012Validator(json.loads(schema)).validate(json.loads(text))
