# SPDX-License-Identifier: Apache-2.0
"""One model of 8 billion weights answers on a machine with 20 GB of free memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine.harness import Engine, end, params
from reference.llada import write_tokenizer
from released_configs import RELEASED

NEEDED = 20
"""GB: 16 of weights in bfloat16, KV, and what a process holds besides."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        psutil.virtual_memory().available < NEEDED * 1e9,
        reason=f"less than {NEEDED} GB of memory are free",
    ),
]


@pytest.fixture
def llada_8b(tmp_path: Path) -> Iterator[Engine]:
    """Every size is LLaDA-8B's; the weights are small random numbers."""
    from vllm import LLM
    from vllm.distributed.parallel_state import destroy_model_parallel

    fields, *_ = RELEASED["LLaDA-8B-Instruct"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    write_tokenizer(
        tmp_path,
        vocab_size=fields["vocab_size"],
        mask_token_id=fields["mask_token_id"],
        eos_token_id=fields["eos_token_id"],
        max_length=4096,
    )
    destroy_model_parallel()
    started = {
        "llada": Engine(
            LLM(
                str(tmp_path),
                load_format="dummy",
                dtype="bfloat16",
                enforce_eager=True,
                max_model_len=64,
                max_num_seqs=2,
                num_gpu_blocks_override=8,
                disable_log_stats=True,
            )
        )
    }
    yield started["llada"]
    end(started)


def test_it_answers(llada_8b: Engine):
    model = llada_8b.runner.model
    assert sum(one.numel() for one in model.parameters()) > 8e9
    strategy = {"strategy": "static", "block_length": 8, "steps": 2}
    sampling = params(8, dlm=strategy, ignore_eos=True)
    first, second = llada_8b.run([[5, 6, 7], [8] * 9], sampling)
    assert len(first.tokens) == len(second.tokens) == 8
    assert first.forwards == second.forwards == 2
    assert llada_8b.run([[5, 6, 7]], sampling) == [first]
