# SPDX-License-Identifier: Apache-2.0
"""End-of-text prediction with other strategies than learn2pd, and other models.

That tokens and forwards are the oracle's shows `test_parity.py` (`threshold/token`,
`threshold/canvas`, `localleap/block`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engine.block_engines import BlockEngines
from engine.cases import Case, expect, make_prompt
from engine.harness import Engine, Finished, params
from engine.test_counts import counting
from reference.cached_procedures import ALL_CACHES
from reference.llada import TinyLLaDA
from tiers import fast

CACHES = fast("dual", of=ALL_CACHES)

LENGTHS = range(1, 17)


def decode(
    engine: Engine, eotp: str, strategy: str = "threshold", **config: Any
) -> list[Finished]:
    """Requests whose end of text is believed at the slightest sign."""
    dlm = {
        "strategy": strategy,
        "strategy_config": config,
        "block_length": 16,
        "eotp": eotp,
        "eotp_threshold": 0.02,
    }
    prompts = [make_prompt(length, 1) for length in LENGTHS]
    return engine.run(prompts, params(48, dlm=dlm))


def shared(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (one, other)))
    )


MODELS = ("SDAR-4B-Chat-b16", "Fast_dLLM_v2_7B")


@pytest.fixture(scope="module", params=fast(MODELS[0], of=MODELS))
def block_engine(
    request: pytest.FixtureRequest, engines: Callable[..., Engine], tmp_path_factory
) -> Engine:
    folder = tmp_path_factory.getbasetemp()
    return BlockEngines(engines, folder, request.param)()


def test_block_causal_models_see_no_padding_to_drop(block_engine: Engine):
    """A cut at a block's end changes nothing: they never see what is right of it."""
    assert decode(block_engine, "block") == decode(block_engine, "off")


def test_a_token_cut_ends_the_text_of_block_causal_models(block_engine: Engine):
    off, token = decode(block_engine, "off"), decode(block_engine, "token")
    earlier = 0
    for length, one, other in zip(LENGTHS, off, token, strict=True):
        if other.tokens == one.tokens:
            continue
        earlier += 1
        # Blocks before the one that was cut are the same.
        cut_block = (length + len(other.tokens) - 1) // 16
        assert shared(one.tokens, other.tokens) >= cut_block * 16 - length
    assert earlier >= 2


def test_a_cut_before_an_end_was_written_hides_no_token(
    engine: Engine, oracle: TinyLLaDA
):
    """What was predicted to be an end may be text when it is written."""
    tokenizer = engine.llm.get_tokenizer()
    ended = opened = 0
    for one in decode(engine, "token"):
        has_end = one.tokens[-1] == oracle.eos_id
        ended += has_end
        opened += not has_end and len(one.tokens) < 48
        assert one.output.finish_reason == ("stop" if has_end else "length")
        shown = one.tokens[:-1] if has_end else one.tokens
        text = tokenizer.decode(shown, skip_special_tokens=True)
        assert one.output.text.strip() == text.strip()
    assert ended >= 2 and opened >= 2


@pytest.mark.slow
def test_where_tokens_may_change_a_block_is_kept_whole(engine: Engine):
    config = {"strategy": "hierarchy", "remask": True}
    token, block = decode(engine, "token", **config), decode(engine, "block", **config)
    assert token == block
    assert token != decode(engine, "off", **config)


def test_cad_holds_ends_of_text_back(engine: Engine):
    config = {"strategy": "cad", "threshold": 0.5, "most": 2}
    free = decode(engine, "off", **config)
    held = decode(engine, "off", **config, release_end=1.0)
    assert sum(len(result.tokens) < 48 for result in free) >= 4
    assert sum(len(result.tokens) for result in held) > 1.2 * sum(
        len(result.tokens) for result in free
    )


class Counting:
    """An oracle that notes which rows each forward computes, and where masks begin."""

    def __init__(self, model: TinyLLaDA) -> None:
        self.model = model
        self.rows: list[tuple[int, int]] = []
        self.first_mask = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, ids, positions, store=None):
        self.rows.append((positions[0], positions[-1] + 1))
        self.first_mask = positions[0] + ids.index(self.model.mask_id)
        return self.model.forward(ids, positions, store)


@pytest.mark.parametrize("cache", CACHES)
def test_what_is_dropped_is_not_computed(engine: Engine, oracle: TinyLLaDA, cache: str):
    """Rows, and rows through lm_head, of every forward of a canvas that shrinks.

    lm_head sees the masks of the block, and all rows right of the block.
    """
    shrunk = 0
    for length in range(2, 26, 3):
        case = Case(make_prompt(length, 1), "threshold/canvas", cache, max_tokens=128)
        model, heads, canvas = Counting(oracle), [], 0

        def note(view, _, model=model, heads=heads):
            nonlocal canvas
            if view.forward == 0:
                canvas = model.first_mask
            block_end = canvas + view.first + len(view.masked)
            ahead = max(model.rows[-1][1] - block_end, 0)
            heads.append(int(view.masked.sum()) + ahead)

        expected = expect(case, model, observe=note)
        with counting(engine) as counts:
            (result,) = engine.run([case.prompt], case.params())
        assert result.tokens == expected.tokens
        computed = [end - start for start, end in model.rows]
        assert counts.rows == computed[: len(counts.rows)]
        assert counts.logits_rows == heads[: len(counts.rows)]
        whole = Counting(oracle)
        expect(replace(case, rule="threshold"), whole)
        shrunk += model.rows != whole.rows
        if shrunk == 1:
            return
    raise AssertionError("too few canvases that shrink")


@pytest.mark.parametrize("count", fast(8, of=(8, 24)))
def test_a_request_decodes_alone_as_beside_others(engine: Engine, count: int):
    """Some look ahead, some do not; what one sees is not another's."""
    lengths, requests = range(1, count + 1), []
    for number, _ in enumerate(lengths):
        dlm = {
            "strategy": ("threshold", "learn2pd", "klass", "static")[number % 4],
            "cache": ALL_CACHES[number % 5],
            "block_length": (8, 16)[number % 2],
            "eotp": ("canvas", "canvas", "block", "off")[number // 2 % 4],
        }
        if dlm["eotp"] != "off":
            dlm["eotp_threshold"] = 0.03
        requests.append(params(40, dlm=dlm))
    prompts = [make_prompt(length, 1) for length in lengths]
    together = engine.run(prompts, requests)
    alone = [
        engine.run([prompt], one)[0]
        for prompt, one in zip(prompts, requests, strict=True)
    ]
    assert together == alone
