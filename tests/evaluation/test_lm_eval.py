# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness over our engines: its tasks, and its model class.

Skipped where lm-eval (the extra `eval`) is not installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_dlm.tasks.problems import sample_problems

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.slow

GENERATE = """\
task: tiny_copy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 32, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
CHOOSE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[wrong, answer]}}}}"
doc_to_target: 1
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tasks about lists that llada-tiny can copy."""
    problems = sample_problems(8, 0, "heldout", ["copy"])
    file = tmp_path / "copy.jsonl"
    rows = (
        {
            "question": one.question,
            "answer": one.answer,
            "wrong": "[" + ", ".join(one.answer[1:-1].split(", ")[::-1]) + "]",
        }
        for one in problems
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("generate", GENERATE), ("choose", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(file=file))
    return tmp_path


def test_tasks_of_both_kinds(evaluate, folder: Path):
    cells = evaluate(
        "llada-tiny",
        *("--tasks", "lm-eval:tiny_copy,lm-eval:tiny_choice"),
        *("--include-path", str(folder), "--samples", "16", "--limit", "8"),
    )
    generated, chosen = cells
    assert generated["metric"] == "exact_match,none"
    assert generated["accuracy"] >= 0.75 and generated["questions"] == 8
    assert generated["tokens_per_forward"] > 1
    # A copy is far more probable than the list turned around.
    assert (chosen["metric"], chosen["accuracy"]) == ("acc,none", 1.0)
    assert chosen["tokens_per_forward"] is None
    with pytest.raises(ValueError, match="did you mean lm-eval:tiny_copy"):
        evaluate(
            "llada-tiny",
            *("--tasks", "lm-eval:tiny_copi", "--include-path", str(folder)),
        )


def test_the_model_class():
    """Registered by name; an autoregressive model's likelihoods are vLLM's own."""
    import vllm
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from vllm_dlm.evaluation.lm_eval_model import VllmDlm

    assert get_model("vllm_dlm") is VllmDlm
    for wrong in ({}, {"pretrained": "llada-tiny", "device": "cpu"}):
        with pytest.raises(ValueError, match="vllm_dlm: "):
            VllmDlm(**wrong)
    from vllm_dlm.evaluation.engines import started

    with started(
        "llama-tiny",
        is_diffusion=False,
        server_options={},
        engine_options={"enforce_eager": True, "max_model_len": 256},
        dtype="float32",
        max_num_seqs=4,
    ) as llm:
        assert isinstance(llm, vllm.LLM)
        model = VllmDlm(llm=llm)
        question = "Copy [Ada, Ben, Carl]"
        pairs = [(question, "[Ada, Ben, Carl]"), (question, "[Ben, Ada, Carl]")]
        requests = [
            Instance("loglikelihood", {}, pair, index)
            for index, pair in enumerate(pairs)
        ]
        (right, greedy), (wrong_one, _) = model.loglikelihood(requests)
        assert greedy and right > wrong_one
        with pytest.raises(ValueError, match="generation_kwargs color: not known"):
            model.generate_until(
                [Instance("generate_until", {}, ("Copy [Ada]", {"color": 1}), 0)]
            )
        with pytest.raises(ValueError, match="loglikelihood_rolling"):
            model.loglikelihood_rolling([])
