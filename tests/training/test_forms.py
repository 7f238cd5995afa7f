# SPDX-License-Identifier: Apache-2.0
"""Tasks, tokenizer and rows of llada-forms, without training."""

import json
import random
import re

import pytest
import torch
from jsonschema import validate
from transformers import PreTrainedTokenizerFast

from vllm_dlm.tasks.forms import tools, values, vocabulary
from vllm_dlm.tasks.forms.evaluation import same_json
from vllm_dlm.tasks.forms.problems import KINDS, draw_problem, held_out_problems
from vllm_dlm.tasks.forms.rows import encode_prompt, encode_row
from vllm_dlm.training.tiny.forms_data import ROWS, make_batch
from vllm_dlm.training.tiny.forms_evaluation import is_right

NUM_PROBLEMS = 60


def problems(kind: str):
    return held_out_problems(kind, NUM_PROBLEMS, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.save_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_and_others_wrong(kind: str):
    for problem in problems(kind):
        row = encode_row(problem, random.Random(0))
        assert is_right(row, row.canvas)
        holes = [place for place, hole in enumerate(row.hole) if hole]
        wrong = list(row.canvas)
        wrong[holes[0]] = vocabulary.EOS_ID
        assert not is_right(row, wrong)
        if problem.schema is not None and problem.kind != "form":
            validate(json.loads(problem.answer), problem.schema)


def test_json_is_compared_as_a_value_with_ordered_keys():
    assert same_json('{"a": 1, "b": "x"}', '{"a":1,"b":"x"}')
    assert not same_json('{"a": 1, "b": 2}', '{"b": 2, "a": 1}')
    assert not same_json('{"a": 1}', '{"a": 1')


def test_names_of_the_splits_are_different():
    rng = random.Random(0)
    draws = [
        {values.first_name(rng, held_out) for _ in range(2000)}
        | {values.city(rng, held_out) for _ in range(2000)}
        for held_out in (False, True)
    ]
    assert all(len(words) > 200 for words in draws)
    assert not draws[0] & draws[1]


@pytest.mark.parametrize("kind", KINDS)
def test_problems_are_stable_and_different(kind: str):
    assert problems(kind) == problems(kind)
    found = {(problem.turns, problem.pieces) for problem in problems(kind)}
    assert len(found) == NUM_PROBLEMS


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="known: .*'suffix'"):
        draw_problem(random.Random(0), kind="poem")


def test_calls_are_those_of_tools_on_offer():
    for count in (1, 2):
        for seed in range(200):
            use = tools.draw_tool_use(random.Random(seed), False, count)
            offered = {tool.name: tool for tool in use.tools}
            assert len(offered) == len(use.tools) and len(use.calls) == count
            text = tools.write_calls(use.calls)
            written = re.findall(r"<tool_call>(.*?)</tool_call>", text)
            for call, found in zip(use.calls, map(json.loads, written), strict=True):
                assert found == {"name": call.name, "arguments": call.arguments}
                schema = offered[call.name].as_openai()["function"]["parameters"]
                validate(dict(call.arguments), schema)
    unfit = [tools.draw_tool_use(random.Random(seed), False, 0) for seed in range(50)]
    assert all(use.tools and not use.calls for use in unfit)


@pytest.mark.parametrize(
    "text",
    [
        'Ada lives in Rome and is 31 -> {"name": "Ada", "city": "Rome", "age": 31}',
        "Zoë, 日本 hello\n\n\n  x\t<tool_call>{}</tool_call>",
        '[{"a": []}, {"b": [{"c": ["d", "e"]}]}]}}"}}',
        "names first_name FIRST namesake 12:30 3.50 (a-b)",
    ],
)
def test_any_text_is_kept(saved: PreTrainedTokenizerFast, text: str):
    ids = saved(text, add_special_tokens=False).input_ids
    assert ids == vocabulary.encode(text)
    assert saved.decode(ids) == vocabulary.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_tokens_of_the_whole(kind: str):
    for problem in problems(kind):
        apart = [vocabulary.encode(piece.text) for piece in problem.pieces]
        assert sum(apart, []) == vocabulary.encode(problem.answer)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_the_chat_template(
    saved: PreTrainedTokenizerFast, kind: str
):
    for problem in problems(kind):
        if not problem.is_chat:
            ids = saved(problem.question).input_ids
        else:
            offered = [tool.as_openai() for tool in problem.tools]
            messages = [
                {"role": turn.role, "content": turn.text} for turn in problem.turns
            ]
            if kind == "tool result":
                # As vLLM hands a call to a template: its arguments are an object.
                call = json.loads(re.sub("</?tool_call>", "", messages[-2]["content"]))
                messages[-2] = {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": call}],
                }
            text = saved.apply_chat_template(
                messages, tools=offered or None, tokenize=False
            )
            ids = saved(text, add_special_tokens=False).input_ids
        assert ids == encode_prompt(problem)


def test_batches_depend_on_seed_and_step_alone():
    lengths = set()
    for step in range(12):
        batch, again = make_batch(step, 1), make_batch(step, 1)
        assert torch.equal(batch.inputs, again.inputs)
        assert torch.equal(batch.weights, again.weights)
        masked = batch.inputs == vocabulary.MASK_ID
        assert torch.equal(masked, batch.weights > 0)
        assert torch.equal(batch.ids[~masked], batch.inputs[~masked])
        assert (batch.inputs[:, 0] == vocabulary.BOS_ID).all()
        assert not (masked & ~batch.valid).any()
        lengths.add(batch.ids.shape[1])
    assert lengths <= set(ROWS) and len(lengths) > 1
    assert not torch.equal(make_batch(0, 1).ids, make_batch(0, 2).ids)


@pytest.mark.slow  # Of weights that do not change.
def test_the_shipped_model_answers_held_out_problems():
    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.training.tiny.forms_evaluation import evaluate_kind
    from vllm_dlm.training.tiny.llada_modeling import load_llada

    model = load_llada(resolve("llada-forms"))
    shares = {
        kind: evaluate_kind(model, kind, 8, canvas=72, seed=77, tokens_per_step=2)
        for kind in ("who are you", "form")
    }
    assert shares["who are you"] >= 0.5
    assert shares["form"] >= 0.25
