# SPDX-License-Identifier: Apache-2.0
"""The engine that is measured: llada-tiny, what its strategies need, its rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

MODEL = "llada-tiny"
DTYPE = "float32"
"""It rounds least, so that other machines make the same tables, and every
CPU multiplies it quickly."""
COUNTED_ANSWERS = 2000
"""Answers whose tokens make the frequency table of the strategy `pc`."""


def start_engine(folder: str | Path, **options: Any) -> Any:
    """A `vllm_dlm.LLM` of llada-tiny in which every strategy finds what it needs.

    Args:
        folder: for files that it reads or writes; nothing is left elsewhere.
        options: further arguments of the engine, in float32 without one of them.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_dlm import LLM

    return LLM(
        MODEL,
        # A file can only be the server's: so `pc` is its strategy, and requests name
        # their own.
        dlm_strategy="pc",
        dlm_strategy_config={"frequencies": str(_count_tokens(Path(folder)))},
        dlm_online_learning=False,
        dlm_filter_dir=str(folder),
        **{"dtype": DTYPE} | options,
    )


class RowCounter:
    """Counts the rows of every forward that an engine in this process schedules."""

    def __init__(self, llm: Any) -> None:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.rows = 0
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.rows += output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted


def _count_tokens(folder: Path) -> Path:
    """Write the token frequencies of answers to the tasks' training questions."""
    from transformers import PreTrainedTokenizerFast

    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.strategies.token_frequencies import save_frequencies
    from vllm_dlm.tasks.problems import sample_problems
    from vllm_dlm.training.counts.token_counts import count_tokens, smoothed

    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve(MODEL))
    answers = [problem.answer for problem in sample_problems(COUNTED_ANSWERS, seed=0)]
    counts = count_tokens(tokenizer, answers, [tokenizer.eos_token_id])
    path = folder / "frequencies.safetensors"
    facts = {"tokenizer": MODEL, "tokens": str(int(counts.sum()))}
    save_frequencies(path, smoothed(counts), facts)
    return path
