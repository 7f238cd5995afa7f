# SPDX-License-Identifier: Apache-2.0
"""Count the tri-grams of texts: `vllm-dlm count-trigrams`.

The table is what ADED drafts from (`--speculative-config '{"method": "aded",
"corpus": FILE}'`). Texts like those that the model will write serve best: answers,
not prompts. Each ends with the tokens that end a text, so that these are drafted too.
A text of several lines belongs into JSON lines: in plain text each line is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_dlm.cli.arguments import count, output_file
from vllm_dlm.spec_decode.aded.trigram_table import (
    KEPT_SUCCESSORS,
    TrigramCounts,
    fingerprint,
    save_table,
)
from vllm_dlm.training.counts import token_counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vllm-dlm count-trigrams`."""
    token_counts.add_text_arguments(parser)
    parser.add_argument(
        "--out",
        type=output_file,
        required=True,
        metavar="FILE",
        help='table to write (safetensors), for "corpus" of the speculative config',
    )
    parser.add_argument(
        "--keep",
        type=count,
        default=KEPT_SUCCESSORS,
        metavar="N",
        help="successors kept of each pair, the most frequent (default: %(default)s)",
    )
    parser.add_argument(
        "--min-count",
        type=count,
        default=1,
        metavar="N",
        help="leave out tri-grams seen less often, for a smaller file "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Count the tri-grams of the files and write their table."""
    tokenizer = token_counts.load_tokenizer(args.tokenizer)
    ends = token_counts.end_ids_of(tokenizer, args.ends)
    paths = [Path(name) for name in args.files]
    texts = token_counts.read_texts(paths, args.field)
    counts = count_trigrams(tokenizer, texts, ends)
    table = counts.table(args.keep, args.min_count)
    if not len(table.tokens):
        raise ValueError(
            f"the files hold no tri-gram {args.min_count} times or more often"
        )
    facts = {
        "tokenizer": args.tokenizer,
        "fingerprint": fingerprint(tokenizer),
        "counted": str(counts.num_trigrams),
    }
    save_table(args.out, table, facts)
    print(
        f"{counts.num_trigrams} tri-grams counted, {len(table.tokens)} kept of "
        f"{len(table.seconds)} pairs -> {args.out}"
    )
    return 0


def count_trigrams(
    tokenizer: Any, texts: Iterable[str], end_ids: Iterable[int] = ()
) -> TrigramCounts:
    """The tri-grams of the texts, none across two texts.

    Args:
        tokenizer: of transformers.
        texts: line breaks at the end of a text do not count.
        end_ids: ids that follow each text.
    """
    counts, ends = TrigramCounts(len(tokenizer)), list(end_ids)
    stripped = (text.rstrip("\n") for text in texts)
    for rows in token_counts.token_rows(tokenizer, stripped):
        for row in rows:
            counts.add([*row, *ends])
    return counts
