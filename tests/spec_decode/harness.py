# SPDX-License-Identifier: Apache-2.0
"""Engines with speculative decoding in this process, and what they decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams, envs
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    model_parallel_is_initialized,
)

MAX_MODEL_LEN = 80

TIGHT: dict[str, Any] = {
    "num_gpu_blocks_override": 14,
    "max_num_batched_tokens": 32,
    "enable_prefix_caching": False,
}
"""Prompts are cut into chunks, and there is room for few requests."""


def write_llama(
    folder: Path,
    seed: int,
    *,
    vocab_size: int = 64,
    num_layers: int = 2,
    hidden_size: int = 128,
    spread: float = 0.2,
) -> Path:
    """A random causal Llama. Heads of 32: vLLM's CPU attention takes no narrower."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=512,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def model_runner(version: int) -> Iterator[None]:
    """Have engines that start inside run on model runner V1, vLLM's choice, or V2.

    As the variable does of which vLLM, in an engine's process, reads only the first
    value.
    """
    name = "VLLM_USE_V2_MODEL_RUNNER"
    if version == 2:
        setattr(envs, name, True)
    try:
        yield
    finally:
        if version == 2:
            delattr(envs, name)


def fade(model: Any, base: float = 0.5) -> Any:
    """Let each layer write less than the one below, as early-exit training does."""
    with torch.no_grad():
        for depth, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight *= base**depth
            layer.mlp.down_proj.weight *= base**depth
    return model


class Engine:
    """A vLLM engine whose drafter a test may look at."""

    def __init__(
        self,
        model: Path,
        speculative: dict[str, Any] | None,
        runner: int = 1,
        **options: Any,
    ):
        # Groups are made by a process's first engine.
        destroy_model_parallel()
        options = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 8,
            "block_size": 32,
            "num_gpu_blocks_override": 48,
        } | options
        with model_runner(runner):
            self.llm = LLM(str(model), speculative_config=speculative, **options)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[list[int]]:
        """Decode all prompts together; the tokens of each."""
        if not model_parallel_is_initialized():
            # vLLM 0.33 destroys the process's groups with any engine in it, one that
            # was refused at its start included.
            with set_current_vllm_config(self.llm.llm_engine.vllm_config):
                ensure_model_parallel_initialized(1, 1)
        results = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            params,
            use_tqdm=False,
        )
        return [list(result.outputs[0].token_ids) for result in results]

    @property
    def worker(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    @property
    def runner(self) -> Any:
        return self.worker.model_runner

    @property
    def drafter(self) -> Any:
        """Ours, on either model runner."""
        if self.worker.use_v2_model_runner:
            return self.runner.speculator
        return self.runner.drafter


def params(max_tokens: int, **options: Any) -> SamplingParams:
    """Greedy, to the end of `max_tokens`, unless told otherwise."""
    options = {"temperature": 0.0, "ignore_eos": True, "detokenize": False} | options
    return SamplingParams(max_tokens=max_tokens, **options)


def ragged_prompts(count: int, vocab_size: int = 64) -> list[list[int]]:
    """Prompts of different lengths, one of a single token, one longer than a page."""
    generator = torch.Generator().manual_seed(count)
    lengths = [1, 9, 40, 17, 33, 5, 28, 12][:count]
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        for length in lengths
    ]


class Rounds:
    """Records what a drafter submits, round by round; undo with `close`."""

    def __init__(self, drafter: Any) -> None:
        self._drafter, self._draft = drafter, drafter.draft
        self.of: dict[str, list[tuple[list[int], list[int]]]] = {}
        """Request -> its rounds: all its tokens, and the draft behind them."""
        drafter.draft = self._record

    def _record(self, batch: Any) -> Any:
        drafts = self._draft(batch)
        for row, request in enumerate(batch.request_ids):
            tokens = batch.token_ids[row, : batch.num_tokens[row]].tolist()
            draft = drafts.tokens[row][: batch.limits[row]]
            if batch.limits[row]:
                self.of.setdefault(request, []).append((tokens, draft))
        return drafts

    def close(self) -> None:
        self._drafter.draft = self._draft


@contextmanager
def preemptions(engine: Engine) -> Iterator[list[Any]]:
    """The requests that the scheduler preempts while the context is open."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    preempt, found = scheduler._preempt_request, []

    def record(request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = record
    yield found
    scheduler._preempt_request = preempt
