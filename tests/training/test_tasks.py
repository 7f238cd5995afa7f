# SPDX-License-Identifier: Apache-2.0
"""Tasks, tokenizer and export of llada-tiny, without training."""

import json

import pytest

from vllm_dlm.tasks import tokenizer
from vllm_dlm.tasks.problems import TASKS, Problem, check, sample_problems

NUM_PROBLEMS = 300


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_tokenizer(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("task", TASKS)
def test_reference_answers_are_right_and_others_wrong(task):
    for problem in sample_problems(NUM_PROBLEMS, 0, tasks=[task]):
        assert problem.check(problem.answer)
        assert check(problem, f" {problem.answer}\n")
        for wrong in ("", "[]", problem.answer[:-1], problem.answer + "1"):
            assert not problem.check(wrong)


@pytest.mark.parametrize(
    ("task", "question", "right", "wrong"),
    [
        (
            "shuffle",
            "Shuffle [Ada, Ben, Carl]",
            ["[Ben, Ada, Carl]", "[Carl, Ben, Ada]"],
            ["[Ada, Ben, Carl]", "[Ada, Ada, Carl]", "[Ben, Ada]", "Ben, Ada, Carl"],
        ),
        (
            "insert_any",
            "Insert Dan anywhere in [Ada, Ben]",
            ["[Dan, Ada, Ben]", "[Ada, Dan, Ben]", "[Ada, Ben, Dan]"],
            ["[Ada, Ben]", "[Dan, Ben, Ada]", "[Dan, Ada, Dan, Ben]"],
        ),
        (
            "replace_any",
            "Replace any name with Dan in [Ada, Ben]",
            ["[Dan, Ben]", "[Ada, Dan]"],
            ["[Ada, Ben]", "[Dan, Dan]", "[Dan, Ada]", "[Dan]"],
        ),
        ("add", "Add 47+85", ["132", "7+5=12, 4+8+1=13, 132"], ["13", "133"]),
        ("sort", "Sort [Dan, Ada]", ["[Ada, Dan]"], ["[Dan, Ada]", "Ada, Dan"]),
    ],
)
def test_checkers(task, question, right, wrong):
    answer = {"add": "7+5=12, 4+8+1=13, 132", "sort": "[Ada, Dan]"}.get(task, "")
    problem = Problem(task, question, answer)
    assert [text for text in right if not problem.check(text)] == []
    assert [text for text in wrong if problem.check(text)] == []


def test_splits_share_no_question():
    train = {p.question for p in sample_problems(2000, 0, "train")}
    held_out = {p.question for p in sample_problems(500, 0, "heldout")}
    assert len(held_out) == 500
    assert not train & held_out


def test_sampling_is_stable():
    assert sample_problems(20, 3) == sample_problems(20, 3)
    assert sample_problems(20, 3) != sample_problems(20, 4)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="known: .*'copy'"):
        sample_problems(1, 0, tasks=["fly"])
    with pytest.raises(ValueError, match="heldout"):
        sample_problems(1, 0, split="test")


def test_answers_are_short_and_known():
    for problem in sample_problems(NUM_PROBLEMS, 1):
        tokens = tokenizer.encode(problem.answer)
        assert len(tokens) < 32
        prompt = tokenizer.encode_prompt(problem.question, chat=True)
        assert tokenizer.UNK_ID not in tokens + prompt
        assert tokenizer.decode([*tokens, tokenizer.EOS_ID]) == problem.answer


def test_vocabulary_fits():
    vocabulary = tokenizer.VOCABULARY
    assert len(set(vocabulary)) == len(vocabulary) <= tokenizer.VOCAB_SIZE


def test_saved_tokenizer_agrees(saved_tokenizer):
    for problem in sample_problems(NUM_PROBLEMS, 2):
        plain = saved_tokenizer(problem.question).input_ids
        assert plain == tokenizer.encode_prompt(problem.question, chat=False)
        messages = [{"role": "user", "content": problem.question}]
        text = saved_tokenizer.apply_chat_template(messages, tokenize=False)
        chat = saved_tokenizer(text, add_special_tokens=False).input_ids
        assert chat == tokenizer.encode_prompt(problem.question, chat=True)
        for text in (problem.question, problem.answer):
            ids = saved_tokenizer(text, add_special_tokens=False).input_ids
            assert saved_tokenizer.decode(ids) == text


def test_unknown_text_gives_unk(saved_tokenizer):
    ids = saved_tokenizer("Zoë, 日本 hello", add_special_tokens=False).input_ids
    assert ids == tokenizer.encode("Zoë, 日本 hello")
    assert tokenizer.UNK_ID in ids


@pytest.mark.parametrize(("step", "parts"), [(5, 1), (99, 2)])
def test_batches_depend_on_seed_and_step_alone(step: int, parts: int):
    torch = pytest.importorskip("torch")
    from vllm_dlm.training.tiny.llada_tiny import make_batches

    batches, again = make_batches(step, 100, 1), make_batches(step, 100, 1)
    # In the second phase, the last steps: short rows and long ones.
    assert len(batches) == parts
    for batch, other in zip(batches, again, strict=True):
        ids, inputs, weights = batch.ids, batch.inputs, batch.weights
        assert torch.equal(ids, other.ids) and torch.equal(inputs, other.inputs)
        assert torch.equal(weights, other.weights)
        masked = inputs == tokenizer.MASK_ID
        assert torch.equal(masked, weights > 0)
        assert torch.equal(ids[~masked], inputs[~masked])
        # The prompt's first token is never masked.
        assert (inputs[:, 0] == tokenizer.BOS_ID).all()


def test_the_padding_of_long_rows_does_not_drown_their_answers():
    torch = pytest.importorskip("torch")
    from vllm_dlm.training.tiny.llada_tiny import (
        LONGEST_ROW,
        SHORT_STEPS,
        STEPS,
        make_batches,
    )

    lengths = set()
    for step in range(SHORT_STEPS, SHORT_STEPS + 100):
        _, batch = make_batches(step, STEPS, 1)
        lengths.add(batch.ids.shape[1])
        weights = batch.weights
        padding = torch.where(weights < 1, weights, 0.0).sum(dim=1)
        assert (padding <= 4.001).all()
    assert max(lengths) == LONGEST_ROW
    assert len(lengths) > 10


def test_each_phase_warms_up_and_falls_to_zero():
    from vllm_dlm.training.tiny.llada_tiny import STEPS, learning_rate, short_steps

    short = short_steps(STEPS)
    rates = [learning_rate(step, STEPS) for step in range(STEPS)]
    assert short < STEPS
    for phase, top in ((rates[:short], 1.0), (rates[short:], 0.5)):
        assert phase[0] < 0.02 and phase[-1] < 0.01
        assert max(phase) == top


def test_export_and_decode(tmp_path):
    torch = pytest.importorskip("torch")
    from vllm_dlm.training.tiny.export import export
    from vllm_dlm.training.tiny.llada_evaluation import decode_static
    from vllm_dlm.training.tiny.llada_modeling import (
        LLaDAModel,
        LLaDAShape,
        load_llada,
    )

    torch.manual_seed(0)
    shape = LLaDAShape(
        vocab_size=tokenizer.VOCAB_SIZE, d_model=32, n_layers=1, n_heads=2
    )
    model = LLaDAModel(shape)
    export(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LLaDAModelLM"]
    assert config["mask_token_id"] == tokenizer.MASK_ID
    loaded = load_llada(tmp_path)
    assert "model.transformer.blocks.0.attn_norm.weight" in loaded.state_dict()
    assert "model.transformer.ff_out.weight" in loaded.state_dict()
    prompts = [
        tokenizer.encode_prompt(problem.question, chat=False)
        for problem in sample_problems(3, 0)
    ]
    together = decode_static(loaded, prompts, canvas=16, block_length=8)
    assert all(tokenizer.MASK_ID not in row[:8] for row in together)
    # The padding of a batch must not change its rows.
    alone = [decode_static(loaded, [p], canvas=16, block_length=8)[0] for p in prompts]
    assert [row[:8] for row in together] == [row[:8] for row in alone]


def test_bad_canvas_is_refused():
    pytest.importorskip("torch")
    from vllm_dlm.training.tiny.llada_evaluation import decode_static

    with pytest.raises(ValueError, match="no multiple"):
        decode_static(None, [[1]], canvas=40, block_length=32)
