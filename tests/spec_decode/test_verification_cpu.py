# SPDX-License-Identifier: Apache-2.0
"""Verification of drafts on a CPU, where vLLM 0.32 has four bugs; ours are mended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from spec_decode.harness import Engine, params, ragged_prompts
from vllm.platforms import current_platform
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

VOCAB = 6


@pytest.fixture(scope="module", autouse=True)
def worker(plain: Engine) -> None:
    """A worker has started, and with it the kernels are in place."""


@pytest.mark.parametrize(
    ("values", "replaced"),
    [
        (torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0.5, 1.0, 2.0])),
        (torch.tensor([0.9, 0.1, 1.0]), torch.tensor([0.9, 0.1, 1.0])),
        (torch.tensor([5, 0, 7], dtype=torch.int32), torch.tensor([5, 1, 7])),
        (torch.tensor([5, 0, 7]), torch.tensor([5, 1, 7])),
    ],
)
def test_each_draft_token_gets_its_requests_value(
    values: torch.Tensor, replaced: torch.Tensor
):
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    # What was in this memory must not show.
    for _ in range(3):
        torch.full((5,), 77.0)
        found = expand_batch_to_tokens(values, ends, 5, 0, 1)
        assert found.dtype == values.dtype
        assert found.tolist() == replaced[[0, 0, 2, 2, 2]].tolist()


@pytest.mark.parametrize("with_probs", [False, True])
def test_token_minus_one_is_never_accepted(with_probs: bool):
    """It stands for no draft. Uniform 0 accepts whatever has a probability."""
    drafts = torch.tensor([1, -1, 3], dtype=torch.int32)
    certain = torch.zeros(3, VOCAB)
    certain[[0, 1, 2], [1, 0, 3]] = 1.0
    output = torch.full((2, 3), -1, dtype=torch.int32)
    rejection_sampler.rejection_random_sample_kernel[(2,)](
        output,
        torch.tensor([1, 3], dtype=torch.int32),
        drafts,
        certain if with_probs else None,
        torch.full((3, VOCAB), 1 / VOCAB),
        torch.tensor([[4], [4]], dtype=torch.int32),
        torch.tensor([5, 5, 5], dtype=torch.int32),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(2, dtype=torch.bool),
        2,
        VOCAB,
        None,
        NO_DRAFT_PROBS=not with_probs,
        SYNTHETIC_MODE=False,
    )
    assert output.tolist() == [[1, 4, -1], [5, -1, -1]]


def test_top_k_alone_in_a_step_without_drafts(engines: Callable[..., Engine]):
    engine = engines({"method": "aded", "num_speculative_tokens": 4})
    sampling = params(8, temperature=0.8, top_k=7, seed=3)
    [text] = engine.run([[3, 4, 5]], sampling)
    assert len(text) == 8 and engine.run([[3, 4, 5]], sampling) == [text]


def test_a_seeded_request_whose_prompt_comes_in_chunks(
    plain: Engine, engines: Callable[..., Engine]
):
    """It draws what it draws where its prompt is computed at once."""
    chunked = engines(max_num_batched_tokens=16, enable_prefix_caching=False)
    prompts = ragged_prompts(5)
    sampling = [params(8, temperature=1.0, seed=seed) for seed in range(5)]
    assert chunked.run(prompts, sampling) == plain.run(prompts, sampling)


def test_a_vllm_that_cannot_be_mended_serves_without_speculation(
    plain: Engine,
    engines: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    speculating = engines({"method": "aded", "num_speculative_tokens": 4})
    monkeypatch.delattr(rejection_sampler, "apply_sampling_constraints")
    # What an engine's worker calls, and then its core.
    current_platform.register_triton_kernel_overrides()
    assert "apply_sampling_constraints" in caplog.text
    config = plain.llm.llm_engine.vllm_config
    current_platform.register_custom_kv_cache_specs(config)
    config = speculating.llm.llm_engine.vllm_config
    with pytest.raises(RuntimeError, match="apply_sampling_constraints"):
        current_platform.register_custom_kv_cache_specs(config)
