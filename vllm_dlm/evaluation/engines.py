# SPDX-License-Identifier: Apache-2.0
"""The engine that answers: a diffusion model's or an autoregressive one's, offline."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from vllm_dlm.evaluation.tasks import Question

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.outputs import RequestOutput

AR_MEMORY = 1 << 30
"""Bytes of an autoregressive model's KV pages on a CPU: vLLM's default takes and clears
most of the memory."""


@dataclass
class Answers:
    """What an engine has answered, and what that took."""

    texts: list[str]
    tokens: int = 0
    forwards: int = 0
    """Of all requests; a forward that several share counts for each of them."""
    seconds: float = 0.0


@contextmanager
def started(
    model: str,
    *,
    is_diffusion: bool,
    server_options: Mapping[str, Any],
    engine_options: Mapping[str, Any],
    **options: Any,
) -> Iterator[LLM]:
    """An engine with its model; it ends with the block.

    Args:
        model: folder, hub id or alias.
        is_diffusion: whether it is one of this package's.
        server_options: of this package's server, without `dlm_`.
        engine_options: of the user's, for vLLM; they win over `options`.
        options: further ones for vLLM.
    """
    import vllm

    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.entrypoints.llm import LLM

    given: dict[str, Any] = {"disable_log_stats": True, **options}
    llm: vllm.LLM
    if is_diffusion:
        own = {f"dlm_{name}": value for name, value in server_options.items()}
        llm = LLM(model, **given | own | dict(engine_options))
    else:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            given["kv_cache_memory_bytes"] = AR_MEMORY
        llm = vllm.LLM(resolve(model), **given | dict(engine_options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answered(
    llm: LLM,
    questions: Sequence[Question],
    *,
    chat: bool,
    max_tokens: int,
    stop: Sequence[str],
    options: Mapping[str, Any],
) -> Answers:
    """The greedy answers to questions, all asked in one call.

    Args:
        chat: through the model's chat template; `stop` is for plain text only.
        options: the request's own, of a diffusion model.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        stop=[] if chat else list(stop),
        extra_args={"dlm": dict(options)} if options else None,
    )
    began = time.perf_counter()
    if chat:
        messages: Any = [question.messages() for question in questions]
        outputs = llm.chat(messages, sampling)
    else:
        outputs = llm.generate([question.text() for question in questions], sampling)
    seconds = time.perf_counter() - began
    return Answers(
        [output.outputs[0].text for output in outputs],
        sum(len(output.outputs[0].token_ids) for output in outputs),
        sum(map(forwards_of, outputs)),
        seconds,
    )


def forwards_of(output: RequestOutput) -> int:
    """Forwards of a finished request: of an autoregressive model, one a token."""
    metrics: Any = output.outputs[0].spec_decode_metrics
    if metrics is None:
        return len(output.outputs[0].token_ids)
    return int(sum(metrics.histogram))


def numbers_of(scores: Sequence[float], answers: Answers) -> dict[str, Any]:
    """A cell's numbers, of its answers and their scores."""
    return {
        "accuracy": mean(scores),
        "accuracy_error": pstdev(scores) / len(scores) ** 0.5,
        "questions": len(scores),
    } | speeds(answers.tokens, answers.forwards, answers.seconds)


def speeds(tokens: int, forwards: int, seconds: float) -> dict[str, Any]:
    """Rates of answers, and the counts that they are made of."""
    return {
        "tokens": tokens,
        "forwards": forwards,
        "seconds": seconds,
        "tokens_per_forward": tokens / forwards if forwards else None,
        "tokens_per_second": tokens / seconds if tokens else None,
    }
