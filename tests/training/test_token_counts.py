# SPDX-License-Identifier: Apache-2.0
"""`vllm-dlm count-tokens`, with the built-in model's tokenizer."""

import json
import math
import re

import pytest
import torch

from vllm_dlm.cli.command import main
from vllm_dlm.config import aliases
from vllm_dlm.strategies.token_frequencies import load_frequencies
from vllm_dlm.training.counts.token_counts import count_tokens, smoothed


class Words:
    """A tokenizer of numbers: "3 1" is the ids 3 and 1."""

    def __len__(self) -> int:
        return 5

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def test_counts_and_smoothing():
    counts = count_tokens(Words(), ["3 1 3", "1 3"], end_ids=[4])
    assert counts.tolist() == [0, 2, 0, 3, 2]
    frequencies = smoothed(counts)
    assert frequencies.dtype == torch.float32
    assert frequencies.tolist() == pytest.approx([1 / 12, 3 / 12, 1 / 12, 4 / 12, 0.25])


def test_more_texts_than_the_tokenizer_gets_at_a_time():
    counts = count_tokens(Words(), ("2 0" for _ in range(700)))
    assert counts.tolist() == [700, 0, 700, 0, 0]


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no text"):
        count_tokens(Words(), [])


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "a.txt").write_text("1 + 2\n\n3 + 4\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"answer": "2 + 2"}) + "\n")
    return tmp_path


def count(texts, *more: str) -> int:
    files = [str(texts / "a.txt"), str(texts / "b.jsonl")]
    out = str(texts / "new" / "table.safetensors")
    argv = ["count-tokens", "--tokenizer", "llada-tiny", "--out", out, *more]
    return main([*argv, "--", *files] if "--ends" in more else [*argv, *files])


def test_the_command(texts, capsys):
    from transformers import AutoTokenizer

    assert count(texts, "--field", "answer") == 0
    assert "table.safetensors" in capsys.readouterr().out
    table = load_frequencies(texts / "new" / "table.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(aliases.resolve("llada-tiny"))
    assert len(table) == len(tokenizer)
    assert math.isclose(table.sum(), 1.0, rel_tol=1e-5)
    # Once per text, as the token that ends each.
    plus = tokenizer.convert_tokens_to_ids("+")
    assert table[plus] == table[tokenizer.eos_token_id] == 4 * table.min()
    four = tokenizer.convert_tokens_to_ids("4")
    assert table[four] == 2 * table.min()


def test_other_ends(texts):
    assert count(texts, "--field", "answer", "--ends", "+") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "b.jsonl, line 1: .*'text'"),
        (("--ends", "<none>"), "no token '<none>'"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
        (("--field", "answer", "/nowhere.txt"), "cannot read the texts"),
    ],
)
def test_what_is_wrong_is_said(texts, capsys, more, message):
    assert count(texts, *more) == 2
    assert re.search(message, capsys.readouterr().err)
