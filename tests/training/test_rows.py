# SPDX-License-Identifier: Apache-2.0
"""Rows of training data: the three forms, the layout, the order."""

import json

import pytest

from vllm_dlm.tasks import tokenizer
from vllm_dlm.training.rows import (
    Row,
    fitting_rows,
    lay_out,
    read_rows,
    rows_of_step,
    split_rows,
    step_generator,
    task_rows,
)

torch = pytest.importorskip("torch")

END = tokenizer.EOS_ID
ROWS = [Row([1, 11, 12], [21, 22, END]), Row([1], [31, END])]


@pytest.fixture(scope="module")
def builtin_tokenizer():
    from vllm_dlm.training.drafters.teacher import load_tokenizer

    return load_tokenizer("llada-tiny")


def write(path, *lines):
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def test_the_three_forms_say_the_same(tmp_path, builtin_tokenizer):
    question, answer = "Copy [Ada, Ben]", "[Ada, Ben]"
    chat = tokenizer.encode_prompt(question, chat=True)
    response = [*tokenizer.encode(answer), END]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    file = write(
        tmp_path / "rows.jsonl",
        {"prompt": question, "response": answer, "source": "is ignored"},
        {"prompt_ids": chat, "response_ids": response},
        {"messages": messages},
    )
    plain = tokenizer.encode_prompt(question, chat=False)
    assert read_rows(file, builtin_tokenizer) == [
        Row(plain, response),
        Row(chat, response),
        Row(chat, response),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "Copy"}, "response"),
        ({"prompt": "Copy", "response": ""}, "response"),
        ({"prompt_ids": [1, 128], "response_ids": [0]}, "from 0 to 114"),
        ({"prompt_ids": [1], "response_ids": [True]}, "response_ids"),
        ({"messages": [{"role": "user", "content": "Copy"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "Copy"}] * 2}, "assistant"),
        ({"text": "Copy"}, '"messages"'),
        ([1, 2], '"prompt_ids"'),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, builtin_tokenizer, line, reason):
    good = {"prompt_ids": [1], "response_ids": [31, END]}
    file = write(tmp_path / "rows.jsonl", good, line)
    with pytest.raises(ValueError, match=r"line 2: ") as error:
        read_rows(file, builtin_tokenizer)
    assert reason in str(error.value)


def test_a_file_without_rows_is_refused(tmp_path, builtin_tokenizer):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        read_rows(tmp_path / "rows.jsonl", builtin_tokenizer)


def test_a_canvas_of_one_length_is_filled_with_ends():
    batch = lay_out(ROWS, end_id=END, canvas_length=4)
    assert batch.ids.tolist() == [
        [1, 11, 12, 21, 22, END, END],
        [1, 31, END, END, END, END, END],
    ]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.valid.int().tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert batch.response.int().tolist() == [
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0, 0],
    ]


def test_rows_of_one_length_and_rows_as_they_are():
    batch = lay_out(ROWS, end_id=END, length=8)
    assert batch.ids.shape == (2, 8) and batch.valid.all()
    assert batch.response.sum(1).tolist() == [5, 7]
    batch = lay_out(ROWS, end_id=END)
    assert batch.response.sum(1).tolist() == [3, 2]
    assert batch.valid.sum(1).tolist() == [6, 3]


def test_rows_that_are_too_long_are_refused_and_can_be_left_out():
    with pytest.raises(ValueError, match="6 tokens, 3 of them the response"):
        lay_out(ROWS, end_id=END, canvas_length=2)
    assert fitting_rows(ROWS, canvas_length=2) == ROWS[1:]
    assert fitting_rows(ROWS, length=5) == ROWS[1:]
    assert fitting_rows(ROWS) == ROWS


def test_an_epoch_has_every_row_once_in_another_order():
    rows = task_rows(10, seed=1)
    first = [row for step in range(5) for row in rows_of_step(rows, 2, 1, step)]
    second = [row for step in range(5, 10) for row in rows_of_step(rows, 2, 1, step)]
    key = str
    assert sorted(first, key=key) == sorted(second, key=key) == sorted(rows, key=key)
    assert first != second
    # More rows than there are come from several epochs.
    assert rows_of_step(rows, 15, 1, 0) == first + second[:5]
    assert rows_of_step(rows, 2, 2, 0) != first[:2]


def test_noise_depends_on_seed_and_step_alone():
    def draw(seed, step):
        return torch.rand(4, generator=step_generator(seed, step)).tolist()

    assert draw(1, 2) == draw(1, 2)
    assert len({tuple(draw(seed, step)) for seed in (1, 2) for step in (1, 2, 12)}) == 6


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_have_every_row_once(parts):
    batch = lay_out(ROWS + ROWS[:1], end_id=END)
    found = list(split_rows(batch, 3, parts))
    assert len(found) == min(parts, 3)
    assert torch.equal(torch.cat([part.ids for part in found]), batch.ids)
    assert torch.equal(torch.cat([part.response for part in found]), batch.response)


def test_rows_of_the_tasks_are_answered_right():
    from vllm_dlm.tasks.problems import is_held_out

    for split in ("train", "heldout"):
        for row in task_rows(20, 3, ["copy"], split):
            text = tokenizer.decode(row.prompt_ids[1:])
            assert tokenizer.decode(row.response_ids) in text
            assert row.response_ids[-1] == END
            question = "Copy " + tokenizer.decode(row.response_ids)
            assert is_held_out(question) == (split == "heldout")
