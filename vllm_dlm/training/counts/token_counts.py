# SPDX-License-Identifier: Apache-2.0
"""Count how often each token occurs in texts: `vllm-dlm count-tokens`.

The table is for the strategy `pc`. f(a) = (n(a) + 1) / (N + V) for a token seen n(a)
times among N, V of the tokenizer's ids in all: adding one gives ids that the texts lack
a frequency over 0, as low as any. Each text ends with the tokens that end a text, so
that these count as what a model writes once per answer, not as the rarest of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_dlm.cli.arguments import output_file
from vllm_dlm.files.whole_files import parse_json, read_lines
from vllm_dlm.strategies.token_frequencies import save_frequencies

BATCH_TEXTS = 256
"""Texts that the tokenizer gets at a time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm count-tokens`."""
    add_text_arguments(parser)
    parser.add_argument(
        "--out",
        type=output_file,
        required=True,
        metavar="FILE",
        help="table to write (safetensors)",
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which texts are counted, and in which tokens."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="plain text, one text per line, or JSON lines (*.jsonl)",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="MODEL",
        help="alias, folder or hub id of the model that will be served",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="field of JSON lines that holds the text (default: %(default)s)",
    )
    parser.add_argument(
        "--ends",
        nargs="+",
        metavar="TOKEN",
        help="tokens that end a text, each counted once per text (default: the "
        "tokenizer's end-of-text token)",
    )


def run(args: argparse.Namespace) -> int:
    """Count the tokens of the files and write their table."""
    tokenizer = load_tokenizer(args.tokenizer)
    ends = end_ids_of(tokenizer, args.ends)
    paths = [Path(name) for name in args.files]
    counts = count_tokens(tokenizer, read_texts(paths, args.field), ends)
    total = int(counts.sum())
    facts = {"tokenizer": args.tokenizer, "tokens": str(total)}
    save_frequencies(args.out, smoothed(counts), facts)
    seen = int((counts > 0).sum())
    print(f"{total} tokens, {seen} of {len(counts)} ids -> {args.out}")
    return 0


def count_tokens(
    tokenizer: Any, texts: Iterable[str], end_ids: Iterable[int] = ()
) -> torch.Tensor:
    """How often each id occurs in the texts, [V] int64.

    Args:
        tokenizer: of transformers; V is its length.
        end_ids: ids that count once more for each text.

    Raises:
        ValueError: there is no text.
    """
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    number = 0
    for rows in token_rows(tokenizer, texts):
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        counts += torch.bincount(ids, minlength=len(counts))
        number += len(rows)
    if number == 0:
        raise ValueError("the files hold no text to count tokens in")
    counts[list(end_ids)] += number
    return counts


def token_rows(tokenizer: Any, texts: Iterable[str]) -> Iterator[list[list[int]]]:
    """The token ids of the texts, many texts at a time."""
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH_TEXTS)):
        yield tokenizer(batch, add_special_tokens=False)["input_ids"]


def smoothed(counts: torch.Tensor) -> torch.Tensor:
    """Shares [V] float32 of counts [V], one added to each."""
    return ((counts + 1).double() / (counts.sum() + len(counts))).float()


def load_tokenizer(model: str) -> Any:
    """The tokenizer of an alias, folder or hub id.

    Raises:
        ValueError: there is none.
    """
    from vllm.tokenizers import get_tokenizer

    from vllm_dlm.config.aliases import resolve
    from vllm_dlm.plugin import register

    register()  # tokenizers that checkpoints bring as code of their own
    try:
        return get_tokenizer(resolve(model))
    except Exception as error:  # damaged files raise the tokenizers' own, of no class
        raise ValueError(f"cannot load the tokenizer of {model}: {error}") from error


def end_ids_of(tokenizer: Any, tokens: list[str] | None) -> list[int]:
    """Ids of the tokens that end a text, by default the tokenizer's own.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if tokens is None:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ValueError(f"--ends: the tokenizer has no token {token!r}")
    return [vocabulary[token] for token in tokens]


def read_texts(paths: list[Path], field: str) -> Iterator[str]:
    """The texts of all files, with a bar over their bytes.

    Raises:
        ValueError: a file cannot be read, or a line of JSON has no such field.
    """
    try:
        size = sum(path.stat().st_size for path in paths)
        with tqdm(total=size, desc="counting", unit="B", unit_scale=True) as progress:
            for path in paths:
                for number, line in enumerate(read_lines(path, "texts"), 1):
                    progress.update(len(line.encode()))
                    if not line.strip():
                        continue
                    if path.suffix == ".jsonl":
                        yield _field(line, field, f"{path}, line {number}")
                    else:
                        yield line  # with its line break: a token like others
    except OSError as error:
        raise ValueError(f"cannot read the texts: {error}") from error


def _field(line: str, field: str, where: str) -> str:
    try:
        return str(parse_json(line)[field])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{where}: not a JSON object with a field {field!r}; --field names another"
        ) from None
