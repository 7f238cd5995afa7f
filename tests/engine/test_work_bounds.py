# SPDX-License-Identifier: Apache-2.0
"""What one request may cost, and what is left of it when it has gone."""

from __future__ import annotations

import itertools
import random
from typing import Any, get_args

import pytest
import torch
from engine.cases import make_prompt
from engine.harness import Engine, params
from reference.registered import PLAIN
from tiers import fast

from vllm_dlm.config.options import SERVER_PARAMETER
from vllm_dlm.option_types import WHOLE_CANVAS
from vllm_dlm.strategies import STRATEGIES
from vllm_dlm.strategies.base import numeric_fields
from vllm_dlm.strategies.post_steps import MOST_POST_STEPS

TOKENS = 12


def extremes(name: str) -> list[dict[str, Any]]:
    """Parameters of a strategy at the ends of what is taken, alone and together."""
    sides: list[dict[str, Any]] = [{}, {}]
    choices: list[dict[str, Any]] = []
    for parameter, field in STRATEGIES[name].Params.model_fields.items():
        if field.json_schema_extra == SERVER_PARAMETER:
            continue
        if (name, parameter) == ("freedave", "eager"):
            continue  # for block attention: `test_freedave_eager.py`
        if field.annotation is bool:
            choices += [{parameter: False}, {parameter: True}]
        elif parameter not in numeric_fields(STRATEGIES[name].Params):
            # Words, or a number that may be left out.
            parts = get_args(field.annotation)
            words = [word for part in parts for word in (get_args(part) or (part,))]
            choices += [{parameter: word} for word in words if isinstance(word, str)]
        for limit in field.metadata:
            for attribute, side, step in (
                *(("ge", 0, 0), ("gt", 0, 1e-6)),
                *(("le", 1, 0), ("lt", 1, -1e-6)),
            ):
                if hasattr(limit, attribute):
                    sides[side][parameter] = getattr(limit, attribute) + step
    if name == "replay":
        # Waits for as long as it may.
        longest = 2 * (2 * 8 + MOST_POST_STEPS + 1) - 1
        return [
            {"recorded_steps": [0] * TOKENS},
            {"recorded_steps": [-1] * TOKENS},
            {"recorded_steps": [longest] + [0] * (TOKENS - 1)},
        ]
    return [{}, *sides, *({**side, **one} for side in sides for one in choices)]


def most_forwards(block_length: int) -> int:
    """What docs/serving.md says of a request of `TOKENS` tokens, whatever it asks."""
    blocks = -(-TOKENS // block_length)
    return blocks * (2 * block_length + MOST_POST_STEPS + 1)


# At both ends; the slow tier has each word there too, and what a request leaves out.
@pytest.mark.parametrize(("first", "end"), fast((1, 3), of=((1, 3), (0, None))))
def test_every_strategy_at_its_extremes(engine: Engine, first: int, end: int | None):
    check_extremes(engine, PLAIN, slice(first, end))


def check_extremes(engine: Engine, names: list[str], some: slice = slice(None)) -> None:
    """Requests of some strategies write what they are to, within their limits.

    Args:
        some: which configurations of each.
    """
    asked, limits = [], []
    source = random.Random(0)
    blocks = itertools.cycle((8, 1, WHOLE_CANVAS))
    for name in names:
        for config in extremes(name)[some]:
            block = 8 if name == "replay" else next(blocks)
            dlm = {"strategy": name, "strategy_config": config, "block_length": block}
            options: dict[str, Any] = {"dlm": dlm, "ignore_eos": True}
            if source.random() < 0.5:
                options |= {"temperature": 2.0, "seed": len(asked)}
            asked.append(params(TOKENS, **options))
            most = most_forwards(TOKENS if block == WHOLE_CANVAS else block)
            # A replay may wait that long, and then writes one at a time.
            limits.append(most + TOKENS * (name == "replay"))
    results = engine.run([make_prompt(5)] * len(asked), asked)
    for sampling, result, limit in zip(asked, results, limits, strict=True):
        assert len(result.tokens) == TOKENS
        assert result.forwards <= limit, sampling.extra_args


def tensors_in(thing: Any, seen: set[int]) -> dict[int, torch.Tensor]:
    """All tensors that can be reached from an object of ours, by identity."""
    if id(thing) in seen:
        return {}
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return {id(thing): thing}
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set, frozenset)):
        parts = list(thing)
    elif type(thing).__module__.startswith("vllm_dlm"):
        parts = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    else:
        return {}
    found: dict[int, torch.Tensor] = {}
    for part in parts:
        found |= tensors_in(part, seen)
    return found


def bytes_kept(engine: Engine) -> int:
    """Of tensors of the sampler and its parts, the models' own aside."""
    sampler = engine.runner.sampler
    seen = {id(sampler.head)}
    return sum(tensor.nbytes for tensor in tensors_in(sampler, seen).values())


def test_nothing_of_a_request_is_kept(engine: Engine):
    """Not its map, its lists of tokens, its log-probabilities, its strategy's memory.

    The second round finds made what the first one had to make for good.
    """

    def ask(shift: int) -> None:
        steps = [(i + shift) % 3 for i in range(50_000)]
        strategies = [
            {"strategy": "replay", "strategy_config": {"recorded_steps": steps}},
            {"strategy": "klass"},
            {"strategy": "credit"},
            {"strategy": "freedave"},
        ]
        sampling = [
            params(
                16,
                dlm=dlm | {"step_map": True, "block_length": 16},
                logprobs=20,
                logit_bias={i: 0.5 for i in range(shift, 100)},
                allowed_token_ids=list(range(120)),
                stop_token_ids=list(range(40, 100)),
                min_tokens=3,
            )
            for dlm in strategies
        ]
        engine.run([make_prompt(5 + shift)] * len(sampling), sampling)
        engine.flush()

    engine.run([make_prompt(5)], params(16, dlm={"strategy": "freedave"}))
    ask(0)
    before = bytes_kept(engine)
    keys = set(engine.runner.sampler.groups._groups)
    assert not any(key[0] == "replay" for key in keys)
    for shift in range(1, 3):
        ask(shift)
        # A map alone has 400,000 bytes; what the last step sent to the host, a few.
        assert abs(bytes_kept(engine) - before) < 1024
        assert set(engine.runner.sampler.groups._groups) == keys
    candidates = engine.runner.sampler.candidates
    assert not candidates.restricted._restrictions
    assert candidates.stop_ids.further is None
    assert before < 2**20
