# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of given texts, by Monte Carlo over masks in the engine.

Each sample is a request: its canvas is the text with some tokens masked, and the
strategy `replay` writes those very tokens (`recorded_tokens`), all masks of a block in
one step. The log-probabilities that vLLM reports of written tokens are those that the
estimate sums (`masks.py`). So samples of all texts share batches like any requests.

Two parts of the published estimate are left out. The mask is never a token here, so it
has no probability; LLaDA's code counts it in. And guidance by a second, unconditional
forward is not done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from vllm_dlm.config.model import ModelDefaults
from vllm_dlm.config.options import served_config
from vllm_dlm.evaluation.masks import draw_masks, part_lengths

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput

Text: TypeAlias = str | Sequence[int]
"""A text, or its token ids."""

ROUNDS = 8
"""Rounds of samples by default: their differences are the standard error."""
PART = 4096
"""Requests that are handed to the engine at a time."""


@dataclass(frozen=True)
class LogLikelihood:
    """What the samples of one text say."""

    value: float
    """In nats: an estimate of a lower bound of the log-likelihood."""
    standard_error: float | None
    """Of the mean over rounds, in nats; None where there is one round only."""
    tokens: int
    """Of the continuation."""
    samples: int
    forwards: int
    """Forwards of the requests; equal masks are computed once."""


@dataclass
class _Work:
    """One text's masks: those that differ, and which sample has which."""

    prompt: list[int]
    target: list[int]
    distinct: np.ndarray
    """[D, L] bool."""
    weights: np.ndarray
    """[D, L] float64."""
    which: np.ndarray
    """[samples] int: row of `distinct`."""


def loglikelihood(
    llm: LLM,
    pairs: Sequence[tuple[Text, Text]],
    *,
    samples: int = 128,
    strata: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[LogLikelihood]:
    """How probable continuations are behind their prompts.

    With full attention, log p(continuation | prompt) is bounded as LLaDA's own
    evaluation does it; a block-causal model's bound is the sum over its blocks, each
    given the ones to its left.

    Args:
        llm: an engine of one of our models (`vllm_dlm.LLM`).
        pairs: prompt and continuation, both texts or both token ids. Of texts, the
            whole is cut into tokens, and blanks that the prompt ends with belong to the
            continuation.
        samples: masks of each continuation.
        strata: samples whose numbers of masks are spread evenly; divides `samples`.
            None: an eighth of them where that is whole, else 1.
        seed: the same seed gives the same masks.
        progress: show vLLM's progress bar.

    Returns:
        In the order of the pairs.

    Raises:
        ValueError: numbers, texts or a model for which there is no such estimate.
        VLLMValidationError: a text that does not fit into the server's context, or into
            one block (256 tokens, more with `dlm_block_length="canvas"`).
    """
    strata = _checked_strata(samples, strata)
    model = _checked_model(llm)
    work = [
        _plan(model, *tokenized(llm, prompt, continuation), samples, strata, rng)
        for (prompt, continuation), rng in zip(pairs, _generators(seed), strict=False)
    ]
    sums = [np.zeros(len(one.distinct)) for one in work]
    forwards: dict[int, int] = defaultdict(int)
    requests = _requests(work, model)
    while part := list(islice(requests, PART)):
        prompts = [{"prompt_token_ids": work[index].prompt} for index, *_ in part]
        outputs = llm.generate(
            prompts, [asked for *_, asked in part], use_tqdm=progress
        )
        for (index, row, _), output in zip(part, outputs, strict=True):
            one = work[index]
            found = _logprobs(output, one.target)
            masked = one.distinct[row]
            sums[index][row] = (found * one.weights[row])[masked].sum()
            metrics: Any = output.outputs[0].spec_decode_metrics
            forwards[index] += sum(metrics.histogram)
    return [
        _estimate(one, sums[index][one.which], strata, forwards[index])
        for index, one in enumerate(work)
    ]


def greedy_matches(
    llm: LLM, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[bool]:
    """Whether the model itself would write continuations: one token in each step.

    The most confident one comes first, as LLaDA's own evaluation asks it.

    Args:
        llm: an engine of one of our models.
        pairs: token ids of prompt and continuation.
    """
    from vllm import SamplingParams

    model = _checked_model(llm)
    options: dict[str, Any] = {"strategy": "static", "cache": "none", "eotp": "off"}
    options |= {"growth": "none", "reference_exact": False}
    if model.is_whole:
        options["block_length"] = "canvas"
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=len(target),
            ignore_eos=True,
            detokenize=False,
            extra_args={"dlm": options | {"steps": len(target)}},
        )
        for _, target in pairs
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in pairs]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        list(output.outputs[0].token_ids) == target
        for output, (_, target) in zip(outputs, pairs, strict=True)
    ]


def tokenized(
    llm: LLM, prompt: Text, continuation: Text
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of what continues it.

    Raises:
        ValueError: one of them is empty, or only one is a text.
    """
    if isinstance(prompt, str) != isinstance(continuation, str):
        raise ValueError(
            "a pair is two texts or two lists of token ids, not one of each"
        )
    if isinstance(prompt, str) and isinstance(continuation, str):
        tokenizer = llm.get_tokenizer()
        blanks = prompt[len(prompt.rstrip()) :]
        first = list(tokenizer.encode(prompt.rstrip()))
        whole = list(tokenizer.encode(prompt.rstrip() + blanks + continuation))
        target = whole[len(first) :]
    else:
        first, target = list(map(int, prompt)), list(map(int, continuation))
    if not first:
        raise ValueError(
            "a prompt is empty: give it a token, such as the one that begins a text"
        )
    if not target:
        raise ValueError("a continuation is empty: it has no likelihood")
    return first, target


@dataclass(frozen=True)
class _Model:
    """How a model cuts a text."""

    defaults: ModelDefaults
    block_length: int
    vocab_size: int

    @property
    def mask_id(self) -> int:
        """The token that stands for a mask."""
        return self.defaults.mask_token_id

    @property
    def is_whole(self) -> bool:
        """Whether the whole text is one block."""
        return not self.defaults.reuses_blocks

    def parts(self, first: int, length: int) -> list[int]:
        """Lengths of the parts of a text that begins at a position."""
        if self.is_whole:
            return [length]
        origin = self.defaults.origin(first, self.block_length)
        return part_lengths(first, length, self.block_length, origin)


def _checked_model(llm: LLM) -> _Model:
    model_config = llm.llm_engine.vllm_config.model_config
    config = model_config.hf_config
    if not hasattr(config, "dlm_class"):
        raise ValueError(
            "loglikelihood is for this package's diffusion models; for another model "
            "ask vLLM for `prompt_logprobs`"
        )
    defaults = ModelDefaults.from_hf_config(config)
    if defaults.leads_blocks:
        raise ValueError(
            f"loglikelihood is not defined for {config.model_type}: its blocks begin "
            "with a token that the block before predicts, and masks would not be "
            "independent of it; choose a model with full attention, or a block-causal "
            "one without such tokens (SDAR, LLaDA2)"
        )
    length = defaults.own_block(served_config(config).block_length)
    return _Model(defaults, length, model_config.get_vocab_size())


def _checked_strata(samples: int, strata: int | None) -> int:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if strata is None:
        return samples // ROUNDS if samples % ROUNDS == 0 else 1
    if not 1 <= strata <= samples or samples % strata:
        raise ValueError(
            f"strata must divide samples, which is {samples}; {strata} does not"
        )
    return strata


def _generators(seed: int) -> Iterator[np.random.Generator]:
    """A generator for each text, which the number of texts does not change."""
    number = 0
    while True:
        yield np.random.default_rng((seed, number))
        number += 1


def _plan(
    model: _Model,
    prompt: list[int],
    target: list[int],
    samples: int,
    strata: int,
    rng: np.random.Generator,
) -> _Work:
    for token in target:
        if not 0 <= token < model.vocab_size:
            raise ValueError(
                f"a continuation holds {token}, which is no token of this model: ids "
                f"go from 0 to {model.vocab_size - 1}"
            )
    if model.mask_id in target:
        raise ValueError(
            f"a continuation holds the mask, token {model.mask_id}: it has no "
            "probability"
        )
    masks, weights = draw_masks(
        model.parts(len(prompt), len(target)), samples, strata, rng
    )
    distinct, first, which = np.unique(
        masks, axis=0, return_index=True, return_inverse=True
    )
    return _Work(prompt, target, distinct, weights[first], which.reshape(-1))


def _requests(work: list[_Work], model: _Model) -> Iterator[tuple[int, int, Any]]:
    """Text, row of its masks, and the sampling parameters of each request."""
    from vllm import SamplingParams

    for index, one in enumerate(work):
        length, target = len(one.target), np.array(one.target)
        options: dict[str, Any] = {
            "strategy": "replay",
            "strategy_config": {
                "recorded_steps": [0] * length,
                "recorded_tokens": one.target,
            },
            "cache": "none",
            "eotp": "off",
            "growth": "none",
            "reference_exact": False,
        }
        if model.is_whole:
            options["block_length"] = "canvas"
        for row, masked in enumerate(one.distinct):
            canvas = np.where(masked, model.mask_id, target).tolist()
            yield (
                index,
                row,
                SamplingParams(
                    temperature=0.0,
                    max_tokens=length,
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                    extra_args={"dlm": options | {"canvas": canvas}},
                ),
            )


def _logprobs(output: RequestOutput, target: list[int]) -> np.ndarray:
    """[L] float64: of each token, as it was written."""
    found: Any = output.outputs[0].logprobs
    assert list(output.outputs[0].token_ids) == target
    return np.array(
        [entry[token].logprob for entry, token in zip(found, target, strict=True)]
    )


def _estimate(
    one: _Work, values: np.ndarray, strata: int, forwards: int
) -> LogLikelihood:
    rounds = values.reshape(-1, strata).mean(axis=1)
    error: float | None = None
    if len(one.distinct) == 1 and len(one.target) == 1:
        error = 0.0
    elif len(rounds) > 1:
        error = float(rounds.std(ddof=1) / len(rounds) ** 0.5)
    return LogLikelihood(
        float(values.mean()), error, len(one.target), len(values), forwards
    )
