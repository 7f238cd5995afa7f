# SPDX-License-Identifier: Apache-2.0
"""Two streams: what their tokens see, and that it is what is seen while decoding."""

import pytest

torch = pytest.importorskip("torch")

from vllm_dlm.training.streams import (  # noqa: E402
    CLEAN,
    NO_TEXT,
    Streams,
)

# Where tokens stand: (text, copy, position). Two texts, one with two copies of its
# second block and one of its first; padding in between.
TOKENS = [
    *((0, CLEAN, place) for place in range(5)),
    *((0, 0, place) for place in range(2, 6)),
    *((NO_TEXT, CLEAN, 0),) * 2,
    *((0, 1, place) for place in range(3, 6)),
    *((1, CLEAN, place) for place in range(3)),
    *((1, 0, place) for place in range(6)),
]
BLOCK = 3


def streams_of(tokens):
    texts, copies, positions = (
        torch.tensor(column)[None] for column in zip(*tokens, strict=True)
    )
    none = torch.zeros_like(texts)
    return Streams(none, none, none.float(), positions, texts, copies)


def sees(query, key):
    """The rule, token by token."""
    (text, copy, place), (key_text, key_copy, key_place) = query, key
    if text != key_text:
        return False
    block, key_block = place // BLOCK, key_place // BLOCK
    if copy == CLEAN:
        return key_copy == CLEAN and key_block <= block
    if key_copy == CLEAN:
        return key_block < block
    return key_copy == copy and key_block == block


@pytest.mark.parametrize("order", ["as they are", "reversed"])
def test_what_a_token_sees(order):
    tokens = TOKENS if order == "as they are" else TOKENS[::-1]
    found = streams_of(tokens).seen(BLOCK)[0]
    wanted = [[sees(query, key) for key in tokens] for query in tokens]
    assert found.tolist() == wanted
    # Everybody sees someone: no row of the softmax is empty.
    assert found.any(1).all()
