# SPDX-License-Identifier: Apache-2.0
"""llama-tiny, steered by llama-tiny-draft: one engine and one reference for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine.harness import end
from steering.reference import BASE, TUNED, Pair

from vllm_dlm.tasks.problems import sample_problems
from vllm_dlm.tasks.tokenizer import encode_prompt

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "block_size": 32,
    # Prompts come in chunks.
    "max_num_batched_tokens": 128,
    # Too few pages for eight requests of 220 tokens.
    "num_gpu_blocks_override": 44,
    "disable_log_stats": True,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair() -> Pair:
    """The reference."""
    return Pair()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """10 held-out questions, half of them as chats, and between them 10 rows of random
    tokens: of the questions llama-tiny is so sure that little steers it."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index, problem in enumerate(sample_problems(10, 3, "heldout")):
        found.append(encode_prompt(problem.question, index % 2 == 0))
        size = (5 + 2 * index,)
        found.append(torch.randint(3, 120, size, generator=generator).tolist())
    return found


class Steered:
    """An engine, whose constants a test may set."""

    def __init__(self, model: str = TUNED, **options: Any) -> None:
        from vllm.distributed.parallel_state import destroy_model_parallel

        from vllm_dlm import LLM

        destroy_model_parallel()
        self.llm = LLM(model, **ENGINE | options)

    def set(self, mu: float, keep: float) -> None:
        """Of all requests from now on, as if the engine had been started so."""
        core = self.llm.llm_engine.engine_core.engine_core
        model = core.model_executor.driver_worker.worker.model_runner.model
        model._mu, model._keep = mu, keep
        assert self.llm.reset_prefix_cache()

    def run(self, prompts: list[list[int]], **options: Any) -> list[Any]:
        """Answers to all prompts together, greedy unless told otherwise."""
        from vllm import SamplingParams

        options = {"temperature": 0, "max_tokens": 24} | options
        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(**options),
            use_tqdm=False,
        )

    def write(self, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        """Their tokens."""
        results = self.run(prompts, **options)
        return [list(result.outputs[0].token_ids) for result in results]


@pytest.fixture(scope="session")
def engines() -> Iterator[Callable[..., Steered]]:
    """`engines(**options)`: that engine of llama-tiny, started once."""
    started: dict[str, Steered] = {}

    def engine(**options: Any) -> Steered:
        key = repr(sorted(options.items()))
        if key not in started:
            started[key] = Steered(**options)
        return started[key]

    yield engine
    end(started)


@pytest.fixture
def steered(engines: Callable[..., Steered]) -> Steered:
    """mu -1.2, keep 0.1, as its flags say."""
    engine = engines(dlm_steer_base=BASE, dlm_steer_mu=-1.2)
    engine.set(-1.2, 0.1)
    return engine
