# SPDX-License-Identifier: Apache-2.0
"""Learn2PD without a filter: a real engine learns one from its own requests."""

import shutil

import pytest
from vllm import LLM, SamplingParams

from vllm_dlm.config.aliases import resolve
from vllm_dlm.strategies.learn2pd_filter import Filter
from vllm_dlm.tasks.problems import sample_problems

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0, max_tokens=64)


def start(model, filter_dir) -> LLM:
    options = {"strategy": "learn2pd", "filter_dir": str(filter_dir)}
    return LLM(
        str(model),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=32,
        additional_config={"dlm": options},
    )


def observers_of(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.sampler.observers


def learning_of(llm):
    return observers_of(llm)["learn2pd"]


def ask(llm, seed, num):
    problems = sample_problems(num, seed, split="train")
    results = llm.generate([p.question for p in problems], GREEDY, use_tqdm=False)
    return [sum(r.outputs[0].spec_decode_metrics.histogram) for r in results]


def test_a_server_without_a_filter_learns_one_and_the_next_start_finds_it(tmp_path):
    model, learned = tmp_path / "llada-tiny", tmp_path / "filters"
    hidden = shutil.ignore_patterns("learn2pd")
    shutil.copytree(resolve("llada-tiny"), model, ignore=hidden)
    llm = start(model, learned)
    learning = learning_of(llm)
    before = ask(llm, 1, 32)
    assert not list(learned.rglob("*.safetensors"))
    for seed in range(2, 150):
        ask(llm, seed, 32)
        if learning._training is not None:
            learning._training.join()
        if list(learned.rglob("*.safetensors")):
            break
    (path,) = learned.rglob("b32-none.safetensors")
    filter = Filter.load(path)
    assert filter.false_positive_rate <= 0.01
    assert "finished requests" in filter.source

    # Requests that begin now use it, and nothing is recorded any more. (The engine
    # forgets a finished request, whose last block is labelled then, in its next step.)
    ask(llm, 1, 1)
    rows = learning.recorder.rows(32, "none")
    after = ask(llm, 1, 32)
    assert learning.recorder.rows(32, "none") == rows
    assert sum(after) < 1.2 * sum(before)

    shutil.rmtree(model / "learn2pd", ignore_errors=True)
    del llm, learning
    again = start(model, learned)
    assert ask(again, 1, 32) == after
    assert learning_of(again).recorder.rows(32, "none") == 0


def test_learning_can_be_switched_off(tmp_path):
    model, learned = tmp_path / "llada-tiny", tmp_path / "filters"
    hidden = shutil.ignore_patterns("learn2pd")
    shutil.copytree(resolve("llada-tiny"), model, ignore=hidden)
    options = {"strategy": "learn2pd", "filter_dir": str(learned)}
    llm = LLM(
        str(model),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=32,
        additional_config={"dlm": {**options, "online_learning": False}},
    )
    ask(llm, 1, 64)
    assert "learn2pd" not in observers_of(llm)
    assert not learned.exists()
