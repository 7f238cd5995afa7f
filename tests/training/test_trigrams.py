# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm count-trigrams`, with the built-in model's tokenizer."""

import json
import re

import pytest

from vllm_dlm.cli.command import main
from vllm_dlm.config import aliases
from vllm_dlm.spec_decode.aded.trigram_table import (
    TrigramTable,
    empty_table,
    fingerprint,
    load_table,
)
from vllm_dlm.training.counts.trigrams import count_trigrams


class Words:
    """A tokenizer of numbers: "3 1" is the ids 3 and 1."""

    def __len__(self) -> int:
        return 6

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def successors(table: TrigramTable, first: int, second: int) -> dict[int, float]:
    from vllm_dlm.spec_decode.aded.drafting import AdaptiveTrigrams
    from vllm_dlm.spec_decode.options import Aded

    return dict(AdaptiveTrigrams(table, Aded()).successors(first, second))


def test_no_trigram_spans_two_texts():
    counts = count_trigrams(Words(), ["3 1 2\n", "3 1", "4"] * 300, end_ids=[5])
    assert counts.num_trigrams == 900
    table = counts.table()
    assert successors(table, 3, 1) == {2: 0.5, 5: 0.5}
    assert successors(table, 1, 2) == {5: 1.0}
    assert len(table.seconds) == 2


def test_no_text_gives_an_empty_table():
    table = count_trigrams(Words(), []).table()
    for array, empty in zip(table, empty_table(6), strict=True):
        assert array.tolist() == empty.tolist()


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text("1 + 2\n\n3 + 4\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"answer": "1 + 3"}) + "\n")
    return tmp_path


def count(texts, *more: str) -> int:
    files = [str(texts / "a.txt"), str(texts / "b.jsonl")]
    out = str(texts / "new" / "table.safetensors")
    argv = ["count-trigrams", "--tokenizer", "llada-tiny", "--out", out, *more]
    return main([*argv, "--", *files] if "--ends" in more else [*argv, *files])


def test_the_command(texts, capsys):
    from transformers import AutoTokenizer

    assert count(texts, "--field", "answer") == 0
    assert "table.safetensors" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(aliases.resolve("llada-tiny"))
    path = texts / "new" / "table.safetensors"
    table = load_table(path, len(tokenizer), fingerprint(tokenizer))
    sums = ("1 + 2", "3 + 4", "1 + 3")
    rows = tokenizer(list(sums), add_special_tokens=False)["input_ids"]
    # A space is a token: each sum's last pair but one is the same.
    [pair] = {tuple(row[-3:-1]) for row in rows}
    third = pytest.approx(1 / 3)
    assert successors(table, *pair) == {row[-1]: third for row in rows}
    assert successors(table, *rows[0][-2:]) == {tokenizer.eos_token_id: 1.0}
    assert count(texts, "--field", "answer", "--keep", "1") == 0
    table = load_table(path, len(tokenizer))
    assert len(successors(table, *pair)) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--field", "answer", "--min-count", "9"), "no tri-gram 9 times"),
        (("--ends", "<none>"), "no token '<none>'"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
    ],
)
def test_what_is_wrong_is_said(texts, capsys, more, message):
    assert count(texts, *more) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_cannot_be_written_is_said_before_counting(texts, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for more, message in (
        (("--keep", "0"), "'0' is not a whole number >= 1"),
        (("--out", str(tmp_path)), "is a folder; name a file"),
        (("--out", str(file / "table")), "cannot write to"),
    ):
        with pytest.raises(SystemExit):
            count(texts, *more)
        assert message in capsys.readouterr().err
