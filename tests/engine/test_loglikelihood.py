# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of given texts: the engine's are those of a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from engine.block_engines import BLOCK, BlockEngines
from engine.cases import make_prompt
from engine.families import FULL_ATTENTION, serving
from engine.harness import Engine, params
from reference.llada import TinyLLaDA
from reference.network import TinyModel, block_causal

from vllm_dlm import loglikelihood
from vllm_dlm.config.aliases import local_folder
from vllm_dlm.evaluation.likelihood import greedy_matches
from vllm_dlm.evaluation.masks import draw_masks
from vllm_dlm.tasks.tokenizer import encode, encode_prompt

Network = TinyLLaDA | TinyModel


def revealed(
    network: Network,
    prompt: Sequence[int],
    target: Sequence[int],
    masked: Sequence[int],
    *,
    shift: int = 0,
    end: int | None = None,
    **visible: Any,
) -> list[float]:
    """log p of the masked tokens of `target[:end]`, in one forward of the rest."""
    row = [*prompt, *target[:end]]
    for i in masked:
        row[len(prompt) + i] = network.mask_id
    logits = network.forward(row, **visible)
    logits[:, network.mask_id] = -torch.inf
    logprobs = logits.double().log_softmax(dim=1)
    return [float(logprobs[len(prompt) + i - shift, target[i]]) for i in masked]


def by_hand(
    network: Network,
    prompt: Sequence[int],
    target: Sequence[int],
    samples: int,
    strata: int,
    rng: np.random.Generator,
    shift: int = 0,
) -> tuple[float, float]:
    """The mean over samples, and its error by the differences of rounds."""
    masks, _ = draw_masks([len(target)], samples, strata, rng)
    values = []
    for row in masks:
        masked = row.nonzero()[0].tolist()
        found = revealed(network, prompt, target, masked, shift=shift)
        values.append(len(target) / len(masked) * sum(found))
    rounds = np.array(values).reshape(-1, strata).mean(axis=1)
    error = rounds.std(ddof=1) / len(rounds) ** 0.5
    return float(np.mean(values)), float(error)


def exact(
    network: Network, prompt: Sequence[int], target: Sequence[int], **options: Any
) -> float:
    """The expectation itself: all masks of a short text."""
    length, total = len(target), 0.0
    for count in range(1, length + 1):
        ways = list(combinations(range(length), count))
        for masked in ways:
            found = revealed(network, prompt, target, masked, **options)
            total += length / count * sum(found) / len(ways) / length
    return total


PAIRS = [
    (make_prompt(5), make_prompt(9, 4)),
    # One token alone: there is one mask only.
    (make_prompt(12, 1), (17,)),
    (make_prompt(3, 2), make_prompt(40, 7)),
    (make_prompt(70, 3), make_prompt(2, 9)),
]


def test_agrees_with_a_plain_loop(engine: Engine, oracle: TinyLLaDA):
    found = loglikelihood(engine.llm, PAIRS, samples=12, strata=3, seed=5)
    for number, ((prompt, target), one) in enumerate(zip(PAIRS, found, strict=True)):
        rng = np.random.default_rng((5, number))
        value, error = by_hand(oracle, prompt, target, 12, 3, rng)
        assert one.value == pytest.approx(value, rel=1e-4)
        assert one.standard_error == pytest.approx(error, rel=1e-3, abs=1e-4)
        assert (one.tokens, one.samples) == (len(target), 12)
        assert one.forwards <= 12
    assert (found[1].forwards, found[1].standard_error) == (1, 0.0)
    # Neither the other texts nor their order in a batch matter.
    again = loglikelihood(engine.llm, PAIRS[:2], samples=12, strata=3, seed=5)
    assert [one.value for one in again] == pytest.approx([o.value for o in found[:2]])


def test_the_mean_is_the_bound_and_the_error_is_its_own(
    engine: Engine, oracle: TinyLLaDA
):
    """All 15 masks of four tokens, by hand, beside 4096 samples of them."""
    prompt, target = make_prompt(6), make_prompt(4, 2)
    (one,) = loglikelihood(engine.llm, [(prompt, target)], samples=4096, strata=64)
    wanted = exact(oracle, prompt, target)
    assert one.forwards == 15
    assert one.standard_error is not None and one.standard_error < -wanted / 100
    assert abs(one.value - wanted) < 4 * one.standard_error
    # Spread over the numbers of masks, samples say more than each by itself.
    (alone,) = loglikelihood(engine.llm, [(prompt, target)], samples=4096, strata=1)
    assert abs(alone.value - wanted) < 4 * alone.standard_error
    assert one.standard_error < alone.standard_error


def test_ends_of_text_are_tokens_like_others(engine: Engine, oracle: TinyLLaDA):
    prompt = make_prompt(6)
    target = (oracle.eos_id, 7, oracle.eos_id, oracle.eos_id)
    (one,) = loglikelihood(engine.llm, [(prompt, target)], samples=2048)
    wanted = exact(oracle, prompt, target)
    assert abs(one.value - wanted) < 4 * one.standard_error


def test_texts_are_cut_as_a_whole(engine: Engine):
    (text,) = loglikelihood(engine.llm, [("t3 t4 ", "t9 t11")], samples=8)
    tokenizer = engine.llm.get_tokenizer()
    prompt = tokenizer.encode("t3 t4")
    whole = tokenizer.encode("t3 t4 t9 t11")
    ids = prompt, whole[len(prompt) :]
    assert len(ids[1]) == text.tokens == 2
    assert loglikelihood(engine.llm, [ids], samples=8) == [text]


def test_a_block_causal_model_block_by_block(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
):
    """Each block given those to its left: a sum over the three that the text is in."""
    sdar = BlockEngines(engines, tmp_path_factory.getbasetemp(), "SDAR-4B-Chat-b16")
    # 14 tokens of the prompt in the first block, and its last two are the text's.
    prompt, target = make_prompt(BLOCK - 2), make_prompt(BLOCK + 4, 5)
    network = sdar.oracle

    def of_block(masked: Sequence[int], end: int) -> float:
        length = len(prompt) + end
        visible = block_causal(length, BLOCK)
        found = revealed(network, prompt, target, masked, end=end, visible=visible)
        return sum(found)

    masks, _ = draw_masks([2, BLOCK, 2], 6, 2, np.random.default_rng((1, 0)))
    bounds = (0, 2, 2 + BLOCK, 4 + BLOCK)
    values = []
    for row in masks:
        total = 0.0
        for first, end in zip(bounds, bounds[1:], strict=False):
            masked = [i for i in range(first, end) if row[i]]
            total += (end - first) / len(masked) * of_block(masked, end)
        values.append(total)
    pairs = [(prompt, target)]
    (one,) = loglikelihood(sdar().llm, pairs, samples=6, strata=2, seed=1)
    assert one.value == pytest.approx(float(np.mean(values)), rel=1e-4)
    assert one.standard_error is not None


def test_a_model_whose_blocks_begin_with_a_lead_is_refused(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
):
    model = BlockEngines(engines, tmp_path_factory.getbasetemp(), "Fast_dLLM_v2_7B")
    with pytest.raises(ValueError, match="not defined for Fast_dLLM"):
        loglikelihood(model().llm, PAIRS)


@pytest.mark.slow
def test_a_model_with_a_shift(
    engines: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
):
    (dream,) = [one for one in FULL_ATTENTION if one.family == "dream"]
    serve = serving(engines, tmp_path_factory.getbasetemp() / "families")
    engine, network = serve(dream)
    prompt, target = make_prompt(6), make_prompt(9, 2)
    (one,) = loglikelihood(engine.llm, [(prompt, target)], samples=8, strata=2)
    rng = np.random.default_rng((0, 0))
    value, _ = by_hand(network, prompt, target, 8, 2, rng, shift=1)
    assert one.value == pytest.approx(value, rel=1e-4)


@pytest.mark.slow
def test_a_trained_model_knows_the_answer(engines: Callable[..., Engine]):
    """llada-tiny, beside the plain loop; what is right is more probable."""
    folder = local_folder("llada-tiny")
    assert folder is not None
    engine, network = engines(model=folder), TinyLLaDA.from_folder(folder)
    question = encode_prompt("Sort [Eva, Ben, Carl]", chat=False)
    right, wrong = encode("[Ben, Carl, Eva]"), encode("[Carl, Ben, Eva]")
    pairs = [(question, right), (question, wrong)]
    found = loglikelihood(engine.llm, pairs, samples=16, strata=4)
    for number, (pair, one) in enumerate(zip(pairs, found, strict=True)):
        rng = np.random.default_rng((0, number))
        value, _ = by_hand(network, *pair, 16, 4, rng)
        assert one.value == pytest.approx(value, rel=1e-3, abs=1e-3)
    assert found[0].value > found[1].value + 5
    assert greedy_matches(engine.llm, pairs) == [True, False]


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([((), (3,))], {}, "prompt is empty"),
        ([((3,), ())], {}, "continuation is empty"),
        ([("t3", (3,))], {}, "not one of each"),
        ([((3,), (4, 120))], {}, "holds the mask, token 120"),
        ([((3,), (4, 128))], {}, "holds 128, which is no token"),
        (PAIRS, {"samples": 0}, "at least 1, not 0"),
        (PAIRS, {"samples": 8, "strata": 3}, "divide samples, which is 8; 3 does not"),
    ],
)
def test_what_has_no_likelihood_is_refused(engine: Engine, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        loglikelihood(engine.llm, pairs, **options)
    # And the engine goes on.
    assert len(engine.run([make_prompt(4)], params(4, ignore_eos=True))[0].tokens) == 4
